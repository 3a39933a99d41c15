"""The loaders through DALI: order and pixels on any number of ranks, resume, exact validation,
clean ends."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from nvidia.dali.backend import GetSchema
from PIL import Image

from bitfleet.trainer.data import (
    DataConfig,
    Dataset,
    TrainLoader,
    ValidationLoader,
    dali,
    loaders,
    normalize,
    open_dataset,
)

CPU = torch.device("cpu")

PAD_CROP = DataConfig(num_threads=1)
RESIZED_CROP = DataConfig(num_threads=1, augmentation="random_resized_crop", image_size=20)
TORCH = DataConfig(num_threads=2, augmentation="random_resized_crop", image_size=20, loader="torch")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("BITFLEET_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def fashion(cache: Path) -> Dataset:
    return open_dataset(PAD_CROP)


@pytest.fixture(scope="module")
def numbered(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """23 images in each split; every pixel of image i is i."""
    root = tmp_path_factory.mktemp("numbered")
    for split in ("train", "val"):
        for index in range(23):
            folder = root / split / "ab"[index // 12]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (index, index, index)).save(folder / f"{index:02d}.png")
    return open_dataset(DataConfig(root=str(root)))


def train_loader(dataset: Dataset, config: DataConfig = PAD_CROP, rank: int = 0, world_size: int = 1) -> TrainLoader:
    return TrainLoader(
        dataset,
        config,
        seed=7,
        global_batch_size=1200,
        num_replicas=12,
        rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        device=CPU,
    )


def digests(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], count: int) -> list[str]:
    return [
        hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        for images, labels in islice(batches, count)
    ]


@pytest.fixture(scope="module")
def stream(fashion: Dataset) -> list[str]:
    """The micro-batches of 7 steps on one rank; an epoch has 5."""
    return digests(train_loader(fashion).batches(), 7 * 12)


@pytest.mark.parametrize("config", [PAD_CROP, RESIZED_CROP, TORCH])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_order_and_pixels_are_the_same_on_any_number_of_ranks(
    fashion: Dataset, config: DataConfig, world_size: int
) -> None:
    whole = digests(train_loader(fashion, config).batches(), 2 * 12)
    assert len(set(whole)) == len(whole)
    per_rank = 12 // world_size
    shares = [
        digests(train_loader(fashion, config, rank, world_size).batches(), 2 * per_rank) for rank in range(world_size)
    ]
    assert [d for step in range(2) for share in shares for d in share[step * per_rank : (step + 1) * per_rank]] == whole


@pytest.mark.parametrize("start_step", [2, 4, 5])
def test_resume_is_the_tail_of_the_stream(fashion: Dataset, stream: list[str], start_step: int) -> None:
    loader = train_loader(fashion)
    assert loader.steps_per_epoch == 5
    assert digests(loader.batches(start_step), (7 - start_step) * 12) == stream[start_step * 12 :]


@pytest.mark.parametrize("config", [PAD_CROP, TORCH])
def test_batches_are_read_while_the_consumer_is_busy(
    fashion: Dataset, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, asked = train_loader(fashion, config), []
    request = loader._request
    monkeypatch.setattr(loader, "_request", lambda epoch, samples: asked.append(epoch) or request(epoch, samples))  # type: ignore[func-returns-value]
    batches = loader.batches()
    next(batches)
    assert 2 <= len(asked) <= 5  # ahead, but not without end


@pytest.mark.parametrize("config", [PAD_CROP, dataclasses.replace(PAD_CROP, loader="torch")])
def test_a_loader_can_be_started_anew(fashion: Dataset, stream: list[str], config: DataConfig) -> None:
    loader = train_loader(fashion, config)
    abandoned = loader.batches(3)
    next(abandoned)
    assert digests(loader.batches(), 12) == stream[:12]  # nothing is resized: both loaders give the same bytes
    with pytest.raises(RuntimeError, match="iterat"):
        next(abandoned)


def test_batches_stay_as_they_are(fashion: Dataset) -> None:
    batches = train_loader(fashion).batches()
    kept = [next(batches) for _ in range(8)]
    copies = [(images.clone(), labels.clone()) for images, labels in kept]
    for _ in range(20):
        next(batches)
    del batches
    for (images, labels), (images_copy, labels_copy) in zip(kept, copies, strict=True):
        assert torch.equal(images, images_copy)
        assert torch.equal(labels, labels_copy)


def test_labels_belong_to_the_images(numbered: Dataset) -> None:
    loader = TrainLoader(
        numbered,
        PAD_CROP,
        seed=1,
        global_batch_size=23,
        num_replicas=1,
        rank=0,
        world_size=1,
        local_world_size=1,
        device=CPU,
    )
    images, labels = next(loader.batches())
    numbers = images[:, 16, 16, 0]
    assert sorted(numbers.tolist()) == list(range(23))
    assert torch.equal(labels, (numbers >= 12).long())
    assert (images.dtype, labels.dtype, images.shape) == (torch.uint8, torch.int64, (23, 32, 32, 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 5, 11, 40])
@pytest.mark.parametrize("name", ["dali", "torch"])
def test_validation_is_exact(
    numbered: Dataset, world_size: int, batch_size: int, name: Literal["dali", "torch"]
) -> None:
    config = DataConfig(val_batch_size=batch_size, num_threads=1, loader=name)
    seen, lengths = [], set()
    for rank in range(world_size):
        loader = ValidationLoader(
            numbered, config, rank=rank, world_size=world_size, local_world_size=world_size, device=CPU
        )
        batches = list(loader)
        lengths |= {len(batches), len(loader)}
        for images, labels in batches:
            assert images.shape == (len(labels), 32, 32, 3)
            assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
            assert labels.tolist() == [number // 12 for number in images[:, 0, 0, 0].tolist()]
            seen += images[:, 0, 0, 0].tolist()
    assert len(lengths) == 1
    assert sorted(seen) == list(range(23))


def test_a_rank_without_images_gets_empty_batches(numbered: Dataset) -> None:
    config = DataConfig(val_batch_size=11, num_threads=1)
    loader = ValidationLoader(numbered, config, rank=29, world_size=30, local_world_size=30, device=CPU)
    for _ in range(2):
        ((images, labels),) = list(loader)
        assert (images.shape, labels.shape) == ((0, 32, 32, 3), (0,))
    assert normalize(images, config.mean, config.std).shape == (0, 3, 32, 32)


def test_validation_can_be_repeated_and_broken_off(numbered: Dataset) -> None:
    loader = ValidationLoader(
        numbered, DataConfig(val_batch_size=4, num_threads=1), rank=0, world_size=1, local_world_size=1, device=CPU
    )
    first = digests(iter(loader), 100)
    next(iter(loader))
    assert len(first) == len(loader) == 6
    assert digests(iter(loader), 100) == first


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    mean, std = (10.0, 20.0, 30.0), (1.0, 2.0, 4.0)
    normalized = normalize(images, mean, std)
    expected = (images.numpy() - np.array(mean, np.float32)) / np.array(std, np.float32)
    np.testing.assert_array_equal(normalized.permute(0, 2, 3, 1).numpy(), expected)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_replicas": 3}, "num_replicas=3 must be a multiple of the number of ranks, 2"),
        ({"global_batch_size": 10}, "global_batch_size=10 must be a multiple of num_replicas=4"),
        ({"global_batch_size": 24}, "global_batch_size=24 must not exceed the 23 training images"),
        ({"seed": -1}, "seed=-1 must be in"),
    ],
)
def test_sizes_that_do_not_fit(numbered: Dataset, arguments: dict[str, int], message: str) -> None:
    sizes = {
        "seed": 0,
        "global_batch_size": 8,
        "num_replicas": 4,
        "rank": 0,
        "world_size": 2,
        "local_world_size": 2,
        "device": CPU,
    }
    with pytest.raises(ValueError, match=message):
        TrainLoader(numbered, PAD_CROP, **(sizes | arguments))


def test_an_image_smaller_than_the_window_is_named(numbered: Dataset) -> None:
    config = DataConfig(image_size=41)
    with pytest.raises(ValueError, match=r"a/00\.png \(32 x 32 pixels\) .*data\.crop_padding=4 .*data\.image_size="):
        TrainLoader(
            numbered,
            config,
            seed=1,
            global_batch_size=8,
            num_replicas=1,
            rank=0,
            world_size=1,
            local_world_size=1,
            device=CPU,
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("crop_padding", -1),
        ("val_batch_size", 0),
        ("num_threads", 0),
        ("augmentation", "crop"),
        ("device", "cuda"),
        ("loader", "pillow"),
        ("on_bad_sample", "skip"),
        ("max_bad_samples", -1),
        ("stall_seconds", 0.0),
        ("stall_seconds", float("inf")),
        ("memory_gib", float("inf")),
        ("std", (1.0, 0.0, 1.0)),
        ("mean", (1.0, float("nan"), 1.0)),
    ],
)
def test_wrong_values_in_the_config(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"data\.{field}="):
        DataConfig(**{field: value})  # type: ignore[arg-type]


def test_a_gpu_decodes_only_for_a_model_on_a_gpu(numbered: Dataset) -> None:
    with pytest.raises(ValueError, match=r"data\.device='gpu' .*CPU"):
        ValidationLoader(numbered, DataConfig(device="gpu"), rank=0, world_size=1, local_world_size=1, device=CPU)


@pytest.mark.parametrize(
    ("config", "device", "index"),
    [
        (DataConfig(), torch.device("cpu"), None),
        (DataConfig(), torch.device("cuda", 2), 2),
        (DataConfig(device="gpu"), torch.device("cuda", 2), 2),
        (DataConfig(device="cpu"), torch.device("cuda", 2), None),
        (DataConfig(loader="torch"), torch.device("cuda", 2), None),
    ],
)
def test_where_images_are_decoded(config: DataConfig, device: torch.device, index: int | None) -> None:
    assert loaders._decoding_index(config, device) == index


@pytest.mark.parametrize("config", [PAD_CROP, RESIZED_CROP, TORCH])
def test_a_model_on_the_cpu_starts_no_cuda(
    numbered: Dataset, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("CUDA was asked for")

    for name in ("is_available", "current_device", "current_stream", "device_count", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, fail)
    place = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": CPU}
    batches = TrainLoader(numbered, config, seed=1, global_batch_size=4, num_replicas=1, **place).batches()
    for images, labels in (next(batches), next(iter(ValidationLoader(numbered, config, **place)))):
        assert images.device == labels.device == CPU


@pytest.mark.parametrize(
    ("largest", "device_bytes", "host_bytes"),
    [(3 * 500 * 400, 600_000, 600_000), (10 << 20, 10 << 20, 8 << 20), (100_000_000, 16 << 20, 8 << 20)],
)
def test_the_gpu_decoder_starts_with_no_more_memory_than_by_default(
    largest: int, device_bytes: int, host_bytes: int
) -> None:
    arguments = dali.gpu_decoding(largest)
    assert arguments["device"] == "mixed"
    assert (arguments["device_memory_padding"], arguments["host_memory_padding"]) == (device_bytes, host_bytes)
    schema = GetSchema("decoders__Image")
    for name, most in (("device_memory_padding", 16 << 20), ("host_memory_padding", 8 << 20)):
        assert schema.GetArgumentDefaultValueString(name) == str(most)


def test_without_dali_the_extra_is_named(numbered: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(
        ValueError,
        match=r"DALI.*'bitfleet\[dali-cu13\]'.*'bitfleet\[dali-cu12\]'.*--data\.loader torch",
    ):
        ValidationLoader(numbered, PAD_CROP, rank=0, world_size=1, local_world_size=1, device=CPU)


def test_without_dali_the_other_loader_reads(numbered: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    config = dataclasses.replace(PAD_CROP, loader="torch")
    loader = ValidationLoader(numbered, config, rank=0, world_size=1, local_world_size=1, device=CPU)
    assert sum(len(labels) for _, labels in loader) == 23


def test_both_wheels_of_dali(numbered: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: name)
    with pytest.raises(ValueError, match="nvidia-dali-cuda130 and nvidia-dali-cuda120"):
        ValidationLoader(numbered, PAD_CROP, rank=0, world_size=1, local_world_size=1, device=CPU)


def test_the_interpreter_ends_cleanly_with_batches_in_flight(fashion: Dataset) -> None:
    script = (
        "import torch\nfrom bitfleet.trainer.data import *\nconfig = DataConfig(num_threads=1)\nloader = "
        "TrainLoader(open_dataset(config), config, seed=1, global_batch_size=64, num_replicas=1, rank=0, world_size=1, "
        "local_world_size=1, device=torch.device('cpu'))\nbatches = loader.batches()\nkept = next(batches)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
