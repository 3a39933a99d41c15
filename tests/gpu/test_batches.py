"""Batches on a real GPU: the bytes of the CPU path, no wait of the host, no memory that is used too
early."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from bitfleet.trainer.data import DataConfig, TrainLoader, open_dataset
from bitfleet.trainer.data.delivery import resize_on_device
from bitfleet.trainer.data.preprocessing import resize_windows, window_table
from bitfleet.trainer.data.request import Batch
from tests.gpu.waits import host_waits
from tests.unit.trainer.data.test_images import photo

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
NUM_IMAGES, SIZE = 64, 160
KINDS = {
    "pad_crop": {"augmentation": "pad_crop", "crop_padding": 8},
    "random_resized_crop": {"augmentation": "random_resized_crop"},
    "official": {"augmentation": "random_resized_crop", "preprocessing": "official"},
}


@pytest.fixture(scope="module")
def num_batches(is_dry: bool) -> int:
    return 3 if is_dry else 20


@pytest.fixture(scope="module")
def matrix(device: torch.device, is_dry: bool) -> torch.Tensor:
    """Work that keeps the device busy."""
    return torch.randn(*2 * [16 if is_dry else 2048], device=device)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFLEET_CACHE", str(folder / "cache"))
        for split in ("train", "val"):
            (folder / "data" / split / "a").mkdir(parents=True)
            for index in range(NUM_IMAGES):
                image = photo(180 + 3 * index, 400 - 3 * index, index)
                image.save(folder / "data" / split / "a" / f"{index:02d}.jpg")
        yield str(folder / "data")


def batches(root: str, model_on: torch.device, **options: Any) -> Iterator[Batch]:
    config = DataConfig(root=root, image_size=SIZE, num_threads=4, **options)
    loader = TrainLoader(
        open_dataset(config),
        config,
        seed=1,
        global_batch_size=32,
        num_replicas=1,
        rank=0,
        world_size=1,
        local_world_size=1,
        device=model_on,
    )
    return loader.batches()


def keep_busy(matrix: torch.Tensor) -> None:
    """Queue milliseconds of work on the current stream."""
    for _ in range(4):
        matrix = (matrix @ matrix).mul_(1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_what_a_cpu_decoded_arrives_as_it_was(
    root: str, kind: str, loader: str, device: torch.device, matrix: torch.Tensor, num_batches: int
) -> None:
    """Read batches while the device is busy, each after later ones: a copy that is not waited for
    would come too late."""
    options = {**KINDS[kind], "loader": loader, "device": "cpu"}
    sums, held = [], []
    for images, labels in islice(batches(root, device, **options), num_batches):
        assert images.device == labels.device == device
        keep_busy(matrix)
        sums.append(images.double().sum())
        held.append((images.clone(), labels.clone()))
        del images, labels  # their memory goes back while the stream still reads it
    expected = list(islice(batches(root, CPU, **options), num_batches))
    for (images, labels), (theirs, their_labels), total in zip(held, expected, sums, strict=True):
        assert torch.equal(images.cpu(), theirs)
        assert torch.equal(labels.cpu(), their_labels)
        assert total.item() == images.double().sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_gpu_decoded_does_not_depend_on_its_load(
    root: str, kind: str, device: torch.device, matrix: torch.Tensor, num_batches: int
) -> None:
    idle = [
        (images.cpu(), labels.cpu()) for images, labels in islice(batches(root, device, **KINDS[kind]), num_batches)
    ]
    held = []
    for images, labels in islice(batches(root, device, **KINDS[kind]), num_batches):
        keep_busy(matrix)
        held.append((images.clone(), labels.clone()))
        del images, labels
    for (images, labels), (theirs, their_labels) in zip(held, idle, strict=True):
        assert torch.equal(images.cpu(), theirs)
        assert torch.equal(labels.cpu(), their_labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"device": "cpu"}, {"loader": "torch"}], ids=["gpu", "cpu", "torch"])
def test_the_host_waits_for_nothing(
    root: str, kind: str, options: dict[str, str], device: torch.device, num_batches: int
) -> None:
    given = batches(root, device, **KINDS[kind], **options)
    for _ in range(3):
        next(given)  # the first ones allocate, and compile the kernel
    with host_waits(device) as waits:
        for _ in range(num_batches):
            next(given)
    assert dict(waits.syncs) == {}


def test_the_kernel_has_the_bits_of_the_torch_version(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the kernel is Triton's")
    rng = np.random.default_rng(0)
    shapes = [(height, width, 3) for height, width in rng.integers(1, 700, (40, 2)).tolist()]
    windows = [torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    flips = rng.integers(0, 2, 40).astype(np.int32)
    table = window_table(shapes, flips)
    whole = torch.cat([window.flatten() for window in windows])
    for size in (1, 24, 224):
        resized = resize_on_device(whole.to(device), table, table.to(device), size)
        expected = resize_windows(windows, flips, size)
        assert torch.equal(resized.cpu().view(torch.int32), expected.view(torch.int32)), size


def test_the_torch_version_has_the_same_bits_on_a_gpu(device: torch.device) -> None:
    windows = [torch.from_numpy(np.array(photo(100 + 9 * index, 300 - 7 * index, index))) for index in range(35)]
    flips = np.arange(35, dtype=np.int32) % 2
    ours = resize_windows([window.to(device) for window in windows], flips, 224)
    assert torch.equal(ours.cpu(), resize_windows(windows, flips, 224))
