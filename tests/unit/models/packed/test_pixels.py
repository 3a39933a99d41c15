"""Pixels without torch are the pixels of the trainer's evaluation."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from bitfleet.packed.pixels import pixels_of
from bitfleet.trainer.data import DataConfig, ValidationLoader, open_dataset
from bitfleet.trainer.data.decoding import decode
from tests.unit.trainer.data.odd_images import write_odd_pixels, write_refused

SIZES = [(28, 28), (33, 47), (64, 31), (9, 200), (300, 211), (1, 5), (70, 70)]
"""Width and height."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = tmp_path / "data" / split / "class"
        folder.mkdir(parents=True)
        for index, (width, height) in enumerate(SIZES):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels[:, :, 0] if index % 3 == 2 else pixels).save(folder / f"{index}.png")
    return tmp_path / "data"


def trainer_pixels(root: Path, config: DataConfig) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    device = torch.device("cpu")
    loader = ValidationLoader(open_dataset(config), config, device=device, rank=0, world_size=1, local_world_size=1)
    return np.concatenate([images.numpy() for images, _ in loader])


@pytest.mark.parametrize("size", [24, 32, 65])
@pytest.mark.parametrize(
    ("geometry", "augmentation", "preprocessing"),
    [
        ("crop", "pad_crop", "torchvision"),
        ("resize_crop", "random_resized_crop", "torchvision"),
        ("official", "random_resized_crop", "official"),
    ],
)
def test_pixels_equal_the_trainers(
    root: Path,
    size: int,
    geometry: str,
    augmentation: Literal["pad_crop", "random_resized_crop"],
    preprocessing: Literal["torchvision", "official"],
) -> None:
    config = DataConfig(
        root=str(root),
        image_size=size,
        augmentation=augmentation,
        preprocessing=preprocessing,
        loader="torch",
        num_threads=1,
    )
    expected = trainer_pixels(root, config)
    for index, row in enumerate(expected):
        with Image.open(root / "val" / "class" / f"{index}.png") as image:
            found = pixels_of(image, {"geometry": geometry, "image_size": size})
        assert found.dtype == row.dtype
        np.testing.assert_array_equal(found, row)


CROP = {"geometry": "crop", "image_size": 40}


def test_odd_images_have_the_pixels_of_the_loaders(tmp_path: Path) -> None:
    for name in write_odd_pixels(tmp_path):
        with Image.open(tmp_path / name) as image:
            found = pixels_of(image, CROP)
        np.testing.assert_array_equal(found, pixels_of(decode((tmp_path / name).read_bytes()), CROP), name)


def test_images_whose_range_of_brightness_is_unknown(tmp_path: Path) -> None:
    for name in write_refused(tmp_path):
        with Image.open(tmp_path / name) as image, pytest.raises(ValueError, match="brightness|separate planes"):
            pixels_of(image, CROP)
