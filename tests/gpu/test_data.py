"""Images on the device: the bytes of data.loader "memory", and DALI's decoding on the GPU."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfleet.launch.bench.gpu.dali import TRANSFORMS, Decoder, Transform, batches_under_load, compare_pixels
from bitfleet.launch.bench.photos import find_photos, write_class_folders
from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, open_dataset

pytestmark = pytest.mark.gpu
ONE_RANK: dict[str, Any] = {"rank": 0, "world_size": 1, "local_world_size": 1}
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
    """Synthetic photos in class folders."""
    pytest.importorskip("nvidia.dali")
    folder = tmp_path_factory.mktemp("photos") / "photos"
    write_class_folders(find_photos(None, 8 if is_dry else 256, len(os.sched_getaffinity(0))), folder)
    return folder


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
