"""The sentences of a GPU without memory, from torch's own text."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitfleet.trainer.run import out_of_memory as module
from bitfleet.trainer.run.out_of_memory import is_out_of_memory, out_of_memory, training_out_of_memory

ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.81 MiB is "
    "free. Including non-PyTorch memory, this process has 79.10 GiB memory in use. Of the allocated memory 77.90 GiB "
    "is allocated by PyTorch, and 0.50 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting ..."
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node1")


def test_torch_s_text_is_cut_to_what_matters() -> None:
    assert out_of_memory(ERROR) == (
        "a GPU of node1 is out of memory (Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
        "5.81 MiB is free)"
    )
    assert out_of_memory(torch.OutOfMemoryError("of another kind. And so on")) == (
        "a GPU of node1 is out of memory (of another kind)"
    )


def test_batch_and_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {1: 77.9e9}[device.index])
    place: dict[str, Any] = {"micro_batch_size": 512, "num_replicas": 8, "device": torch.device("cuda", 1)}
    sentence = training_out_of_memory(ERROR, precision="tf32", **place)
    assert sentence.startswith(out_of_memory(ERROR))
    assert sentence.endswith(
        "a rank trains on 512 images at a time in tf32, 77.9 GB are allocated; what helps: --num_replicas 16 "
        "(micro-batches of half the images), a smaller --global_batch_size, --engine.precision bf16, in a validation "
        "--data.val_batch_size"
    )
    assert "precision" not in training_out_of_memory(ERROR, precision="bf16", **place).split("what helps")[1]


CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "3600000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ERROR, "a GPU of node1 is out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "a GPU of node1 is out of",
        ),
        (
            RuntimeError("CUDA error: out of memory\nCompile with"),
            "a GPU of node1 is out of memory (CUDA error: out of memory",
        ),
        (CPU, "node1 is out of memory (tried to allocate 3,600.00 GB, 7.50 GB are free)"),
        (
            MemoryError("Unable to allocate 3.00 GiB for an array"),
            "node1 is out of memory (Unable to allocate 3.00 GiB for an",
        ),
        (MemoryError(), "node1 is out of memory (Python got no more, 7.50 GB are free)"),
    ],
)
def test_every_kind_of_missing_memory(error: BaseException, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=7.5e9))
    assert is_out_of_memory(error)
    assert out_of_memory(error).startswith(expected)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), OSError("CUDA")])
def test_other_errors_are_not_about_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("batch", "num_replicas", "way"),
    [
        (12, 2, "--num_replicas 4 (micro-batches of half the images), a smaller"),
        (18, 2, "--num_replicas 6 (micro-batches of 3 images), a smaller"),
        (14, 2, "a smaller"),  # 7 images share in no way that leaves two
        (6, 2, "a smaller"),
    ],
)
def test_the_way_out_works(batch: int, num_replicas: int, way: str) -> None:
    """The number of replicas that is named divides the batch, and leaves BatchNorm two images."""
    place: dict[str, Any] = {"micro_batch_size": batch // num_replicas, "num_replicas": num_replicas}
    sentence = training_out_of_memory(CPU, precision="fp32", device=torch.device("cpu"), **place)
    assert f"what helps: {way}" in sentence
    assert f"a rank trains on {batch // num_replicas} images at a time in fp32, " in sentence
    assert re.search(r"\d\.\d GB are allocated;", sentence)
