"""Images on the device: the bytes of data.loader "memory", and DALI's decoding on the GPU."""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from bitfleet.launch.bench.photos import ONE_RANK, find_photos, train_batches, write_class_folders
from bitfleet.launch.bench.timing import synchronize
from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, open_dataset

pytestmark = pytest.mark.gpu
Decoder = Literal["cpu", "gpu"]
FAR = 8.0


class Transform(NamedTuple):
    """Options that turn a photo into pixels."""

    preprocessing: str
    augmentation: str
    image_size: int


TRANSFORMS = (
    Transform("torchvision", "random_resized_crop", 224),
    Transform("official", "random_resized_crop", 224),
    Transform("torchvision", "pad_crop", 224),
)
transforms = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda each: f"{each[0]}-{each[1]}")


def test_images_in_memory_have_the_bytes_of_the_cpu(device: torch.device, tiny_images: Path) -> None:
    config = DataConfig(root=str(tiny_images), loader="memory")
    dataset = open_dataset(config)
    read = []
    for where in (torch.device("cpu"), device):
        train = TrainLoader(dataset, config, seed=0, global_batch_size=16, num_replicas=1, device=where, **ONE_RANK)
        validation = ValidationLoader(dataset, config, device=where, **ONE_RANK)
        batches = [*itertools.islice(train.batches(), 15), *validation]
        assert {images.device for images, _ in batches} == {where}
        read.append([(images.cpu(), labels.cpu()) for images, labels in batches])
    for (images, labels), (others, other_labels) in zip(*read, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@pytest.fixture(scope="module")
def photos(is_dry: bool, device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of the data set $BITFLEET_GPU_PHOTOS, or synthetic ones, in class folders."""
    pytest.importorskip("nvidia.dali")
    root, num_photos = os.environ.get("BITFLEET_GPU_PHOTOS"), 8 if is_dry else 256
    photos = find_photos(root, num_photos, len(os.sched_getaffinity(0)))
    return write_class_folders(photos, tmp_path_factory.mktemp("photos"))


def sized(transform: Transform, is_dry: bool) -> Transform:
    return transform._replace(image_size=64) if is_dry else transform


@transforms
def test_the_gpu_decodes_what_the_cpu_does(
    transform: Transform, photos: Path, device: torch.device, is_dry: bool
) -> None:
    """The bounds are a prediction: rounding of another inverse transform and resize, no other
    window, flip or chroma."""
    decoders: tuple[Decoder, Decoder] = ("cpu", "cpu") if is_dry else ("gpu", "cpu")
    found = compare_pixels(photos, sized(transform, is_dry), decoders, device, batch_size=4 if is_dry else 64)
    print(transform._asdict() | found)
    assert found["labels_equal"]
    assert found["mean"] <= {"torchvision": 1.0, "official": 2.0}[transform.preprocessing]
    assert found["share_far"] <= 0.01


@transforms
def test_a_busy_gpu_changes_no_pixel(transform: Transform, photos: Path, device: torch.device, is_dry: bool) -> None:
    decoder: Decoder = "cpu" if is_dry else "gpu"
    batch_size, num_batches = (4, 2) if is_dry else (128, 20)
    different = batches_under_load(
        photos, sized(transform, is_dry), decoder, device, batch_size=batch_size, num_batches=num_batches
    )
    assert different == 0


def _config(root: Path, transform: Transform, decoder: Decoder, batch_size: int) -> DataConfig:
    options: dict[str, Any] = transform._asdict()
    return DataConfig(root=str(root), device=decoder, val_batch_size=batch_size, **options)


def compare_pixels(
    root: Path, transform: Transform, decoders: tuple[Decoder, Decoder], device: torch.device, *, batch_size: int
) -> dict[str, float]:
    """Read two training and two validation batches of the folder `root` with each decoder.

    Returns:
        num_images; labels_equal; and of the differences of pixels (0 to 255) the mean, share_far
        above FAR, and the largest.
    """
    batches = []
    for decoder in decoders:
        config = _config(root, transform, decoder, batch_size)
        dataset = open_dataset(config)
        dataset = dataclasses.replace(dataset, val=dataset.train)
        validation = iter(ValidationLoader(dataset, config, device=device, **ONE_RANK))
        streams = train_batches(dataset, config, batch_size, device), validation
        read = [batch for stream in streams for batch in itertools.islice(stream, 2)]
        batches.append([(images.float().cpu(), labels.cpu()) for images, labels in read])
    pairs = list(zip(*batches, strict=True))
    difference = torch.cat([(a[0] - b[0]).abs().reshape(-1) for a, b in pairs])
    return {
        "num_images": sum(len(a[1]) for a, _ in pairs),
        "labels_equal": all(torch.equal(a[1], b[1]) for a, b in pairs),
        "mean": float(difference.mean()),
        "share_far": float((difference > FAR).float().mean()),
        "largest": float(difference.max()),
    }


def batches_under_load(
    root: Path, transform: Transform, decoder: Decoder, device: torch.device, *, batch_size: int, num_batches: int
) -> int:
    """Count batches with other pixels when the GPU is busy and its memory is reused at once.

    A buffer of DALI that is freed or overwritten before its copy has been read would show here.
    """
    config = _config(root, transform, decoder, batch_size)
    quiet, busy = (_checksums(config, device, batch_size, num_batches, is_busy=is_busy) for is_busy in (False, True))
    return int((quiet != busy).any(1).sum())


def _checksums(config: DataConfig, device: torch.device, batch_size: int, num_batches: int, *, is_busy: bool) -> Tensor:
    """A weighted sum of the pixels of every image, fp64 [num_batches, batch_size], on the CPU."""
    stream = train_batches(open_dataset(config), config, batch_size, device)
    side, scrap = (4096, 32 << 20) if device.type == "cuda" else (64, 64)
    matrix = torch.randn(side, side, device=device)
    sums = []
    for images, _ in itertools.islice(stream, num_batches):
        weights = torch.arange(1, images[0].numel() + 1, device=images.device, dtype=torch.float64)
        sums.append((images.double().reshape(len(images), -1) * weights).sum(1))
        del images
        if not is_busy:
            synchronize(device)
            continue
        for _ in range(4):
            matrix @ matrix
            torch.full((scrap,), 7.0, device=device)  # takes and frees what has just been freed
    return torch.stack(sums).cpu()
