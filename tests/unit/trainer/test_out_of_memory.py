"""The sentences of a GPU without memory, from torch's own text."""

import dataclasses

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.trainer import out_of_memory as module
from bitfleet.trainer.config import with_precision
from bitfleet.trainer.out_of_memory import out_of_memory, training_out_of_memory

ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.81 MiB is free. "
    "Including non-PyTorch memory, this process has 79.10 GiB memory in use. Of the allocated memory 77.90 GiB is allocated by "
    "PyTorch, and 0.50 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting ..."
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node1")


def test_torch_s_text_is_cut_to_what_matters() -> None:
    assert out_of_memory(ERROR) == (
        "a GPU of node1 is out of memory (Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.81 MiB "
        "is free)"
    )
    assert out_of_memory(torch.OutOfMemoryError("of another kind. And so on")) == (
        "a GPU of node1 is out of memory (of another kind)"
    )


def test_batch_and_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {1: 77.9e9}[device.index])
    config = dataclasses.replace(with_precision(load_config("birealnet18_imagenet"), "cuda"), global_batch_size=4096)
    place = {"num_replicas": 8, "device": torch.device("cuda", 1), "predicted": 83_210_000_000}
    sentence = training_out_of_memory(ERROR, config, **place)  # type: ignore[arg-type]
    assert sentence.startswith(out_of_memory(ERROR))
    assert sentence.endswith(
        "a rank trains on 512 images at a time in tf32, 83.2 GB were predicted, 77.9 GB allocated; what helps: "
        "--num_replicas 16 (micro-batches of half the images), a smaller --global_batch_size, --engine.precision bf16, in a "
        "validation --data.val_batch_size"
    )
    half = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bf16"))
    assert "precision" not in training_out_of_memory(ERROR, half, **place).split("what helps")[1]  # type: ignore[arg-type]
