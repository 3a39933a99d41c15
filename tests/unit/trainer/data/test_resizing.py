"""Resizing by threads, and of images that are much longer than wide."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from bitfleet.trainer.data import DataConfig, ValidationLoader, open_dataset, resizing
from bitfleet.trainer.data.image_list import ImageList
from bitfleet.trainer.data.request import Request
from bitfleet.trainer.data.resizing import Resizer, central_view, is_long, resized_size
from bitfleet.trainer.data.sampler import Windows
from tests.unit.trainer.data.test_images import photo


def request_of(count: int) -> Request:
    """A request of `count` images, each mirrored; the list that they are of does not matter
    here."""
    images = ImageList(
        folder=None,  # type: ignore[arg-type]
        names=np.array([b"a"] * 9),
        labels=np.arange(9),
        heights=np.full(9, 50, np.int32),
        widths=np.full(9, 60, np.int32),
        sizes=np.ones(9, np.int64),
    )
    corners = np.zeros((count, 2), np.int32)
    return Request(images, np.arange(count), Windows(corners, corners), np.ones(count, np.int32), 0)


def windows(count: int) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(photo(40 + index, 50, index))) for index in range(count)]


@pytest.mark.parametrize("geometry", ["crop_resize", "resize_crop", "crop_bicubic"])
def test_batches_do_not_depend_on_the_number_of_threads(geometry: str) -> None:
    counts = [5, 1, 0, 8]
    one, three = (
        list(Resizer(geometry, 24, threads).resized((windows(n), request_of(n)) for n in counts))  # type: ignore[arg-type]
        for threads in (1, 3)
    )
    assert [sum(map(len, parts)) for parts, _ in one] == counts
    for (parts, request), (others, same), count in zip(one, three, counts, strict=True):
        assert len(request.samples) == len(same.samples) == count
        assert count == 0 or torch.equal(torch.cat(list(parts)), torch.cat(list(others)))


def test_an_error_comes_after_the_batches_before_it() -> None:
    def decoded() -> Iterator[tuple[list[torch.Tensor], Request]]:
        yield windows(2), request_of(2)
        yield windows(3), request_of(3)
        raise ValueError("broken")

    batches = Resizer("crop_resize", 24, 2).resized(decoded())
    assert [sum(map(len, next(batches)[0])) for _ in range(2)] == [2, 3]
    with pytest.raises(ValueError, match="broken"):
        next(batches)


ONE_RANK: Any = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": torch.device("cpu")}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def of_torchvision(pixels: np.ndarray, size: int) -> np.ndarray:
    steps = transforms.Compose([transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)])
    return np.asarray(steps(Image.fromarray(pixels)))


@pytest.mark.parametrize("shape", [(1, 400), (400, 1), (2, 77), (3, 1000), (30, 1000), (90, 91), (200, 5000), (1, 1)])
@pytest.mark.parametrize("size", [8, 31, 56])
def test_it_is_the_centre_of_the_whole_resize(shape: tuple[int, int], size: int) -> None:
    pixels = noise(*shape)
    ours = central_view(pixels, size)
    assert ours.shape == (size, size, 3)
    assert np.abs(ours.astype(int) - of_torchvision(pixels, size)).max() <= 2


def test_only_long_images_are_seen_this_way() -> None:
    assert not is_long(375, 500, 224)
    assert not is_long(100, 2400, 224)
    assert is_long(100, 2500, 224)
    assert is_long(20_000, 1, 32)
    assert resized_size(1, 20_000, 224) == (256, 5_120_000)
    assert resized_size(375, 500, 224) == (256, 341)


@pytest.mark.parametrize("loader", ["dali", "torch", "memory"])
def test_no_loader_resizes_all_of_a_long_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    shapes = [(1, 3000), (3000, 1), (40, 60), (3, 100)]
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index, shape in enumerate(shapes):
            Image.fromarray(noise(*shape)).save(tmp_path / split / "a" / f"{index}.png")
    areas: list[int] = []
    interpolate, resize = resizing.interpolate, Image.Image.resize

    def seen_by_torch(batch: torch.Tensor, *, size: tuple[int, int], **how: Any) -> torch.Tensor:
        areas.append(size[0] * size[1])
        return interpolate(batch, size=size, **how)

    def seen_by_pillow(image: Image.Image, size: tuple[int, int], *arguments: Any, **how: Any) -> Image.Image:
        areas.append(size[0] * size[1])
        return resize(image, size, *arguments, **how)

    monkeypatch.setattr(resizing, "interpolate", seen_by_torch)
    monkeypatch.setattr(Image.Image, "resize", seen_by_pillow)
    config = DataConfig(
        root=str(tmp_path),
        augmentation="random_resized_crop",
        image_size=56,
        num_threads=1,
        loader=loader,  # type: ignore[arg-type]
    )
    ((images, _),) = ValidationLoader(open_dataset(config), config, **ONE_RANK)
    assert len(areas) == len(shapes)
    assert max(areas) <= 32 * 56 * 56
    for ours, shape in zip(images.numpy().astype(int), shapes, strict=True):
        assert np.abs(ours - of_torchvision(noise(*shape), 56)).max() <= 2
