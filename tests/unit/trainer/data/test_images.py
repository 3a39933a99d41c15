"""Pixels: what DALI reads, crops and resizes against Pillow and torchvision, and images that cannot
be read."""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, open_dataset

CPU = torch.device("cpu")

SIZES = [(375, 500), (500, 375), (333, 499), (257, 257), (256, 341), (401, 223), (601, 417), (224, 224), (61, 47)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image with detail at every scale, as photographs have: noise of falling amplitude,
    enlarged."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float64) * 4 / cells
    pixels -= pixels.min()
    return Image.fromarray((pixels * 255 / pixels.max()).astype(np.uint8))


def write_root(root: Path, write: Callable[[Path], None]) -> str:
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        write(root / split / "a")
    return str(root)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    def write(folder: Path) -> None:
        for index, (height, width) in enumerate(SIZES):
            subsampling = index % 2 * 2  # 4:4:4 and 4:2:0
            photo(height, width, index).save(folder / f"{index}.JPEG", quality=92, subsampling=subsampling)

    return write_root(tmp_path_factory.mktemp("photos"), write)


def validation_images(config: DataConfig) -> list[np.ndarray]:
    loader = ValidationLoader(open_dataset(config), config, rank=0, world_size=1, local_world_size=1, device=CPU)
    return [image.numpy().astype(np.int64) for images, _ in loader for image in images]


def train_loader(config: DataConfig, batch_size: int) -> TrainLoader:
    return TrainLoader(
        open_dataset(config),
        config,
        seed=3,
        global_batch_size=batch_size,
        num_replicas=1,
        rank=0,
        world_size=1,
        local_world_size=1,
        device=CPU,
    )


@pytest.mark.parametrize(("size", "loader"), [(224, "dali"), (97, "dali"), (224, "torch"), (97, "torch")])
def test_validation_is_that_of_torchvision(photos: str, size: int, loader: Literal["dali", "torch"]) -> None:
    """Pillow resizes in 8-bit fixed point, DALI in float: a difference of 1 in some pixels, no
    shift."""
    config = DataConfig(
        root=photos,
        augmentation="random_resized_crop",
        image_size=size,
        val_batch_size=4,
        num_threads=1,
        loader=loader,
    )
    furthest, mean = {"dali": (1, 0.25), "torch": (0, 0.0)}[loader]
    images = open_dataset(config).val
    resized = size * 256 // 224
    reference = transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(size), transforms.PILToTensor()])
    for index, ours in enumerate(validation_images(config)):
        with Image.open(images.path(index)) as image:
            theirs = reference(image).permute(1, 2, 0).numpy()
        assert np.abs(ours - theirs).max() <= furthest, images.path(index)
        assert np.abs(ours - theirs).mean() <= mean, images.path(index)


def test_validation_of_100_photos_is_that_of_torchvision(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    (tmp_path / "data/train/a").mkdir(parents=True)
    (tmp_path / "data/val/a").mkdir(parents=True)
    photo(40, 40).save(tmp_path / "data/train/a/0.jpg")
    for index, (height, width) in enumerate(rng.integers(90, 500, (100, 2)).tolist()):
        photo(height, width, index).save(tmp_path / f"data/val/a/{index:03d}.jpg", quality=90)
    config = DataConfig(root=str(tmp_path / "data"), augmentation="random_resized_crop", image_size=224)
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    images = open_dataset(config).val
    means = []
    for index, ours in enumerate(validation_images(config)):
        with Image.open(images.path(index)) as image:
            means.append(np.abs(ours - reference(image).permute(1, 2, 0).numpy()).mean())
    assert len(means) == 100
    assert max(means) <= 0.25


@pytest.mark.parametrize("name", ["dali", "torch"])
def test_random_resized_crop_is_that_of_pillow(photos: str, name: Literal["dali", "torch"]) -> None:
    config = DataConfig(root=photos, augmentation="random_resized_crop", image_size=96, num_threads=1, loader=name)
    loader = train_loader(config, len(SIZES))
    batches, requests = loader.batches(), loader.requests()
    flips = set()
    for (images, _), request in islice(zip(batches, requests, strict=True), 6):
        for index, ours in enumerate(images.numpy().astype(np.int64)):
            (top, left), (bottom, right) = request.windows.starts[index], request.windows.ends[index]
            with Image.open(request.path(index)) as image:
                window = image.crop((left, top, right, bottom)).resize((96, 96), Image.Resampling.BILINEAR)
            theirs = np.asarray(window).astype(np.int64)
            if request.flips[index]:
                theirs = theirs[:, ::-1]
            flips.add(int(request.flips[index]))
            assert np.abs(ours - theirs).max() <= 2, request.path(index)  # a ROI of 4:2:0 may round chroma again
            assert np.abs(ours - theirs).mean() <= 0.25, request.path(index)
    assert flips == {0, 1}


@pytest.mark.parametrize("flip", [True, False])
def test_pad_crop_moves_and_mirrors_and_changes_no_pixel(tmp_path: Path, flip: bool) -> None:
    sizes = [(28, 28), (30, 41), (33, 26), (24, 24)]

    def write(folder: Path) -> None:
        for index, size in enumerate(sizes):
            photo(*size, index).save(folder / f"{index}.png")

    config = DataConfig(root=write_root(tmp_path / "data", write), num_threads=1, flip=flip)
    loader = train_loader(config, 4)
    flips = []
    for (images, _), request in islice(zip(loader.batches(), loader.requests(), strict=True), 10):
        for index, ours in enumerate(images.numpy()):
            with Image.open(request.path(index)) as image:
                padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
            top, left = request.windows.starts[index] + 4
            theirs = padded[top : top + 32, left : left + 32]
            np.testing.assert_array_equal(ours, theirs[:, ::-1] if request.flips[index] else theirs)
        flips += request.flips.tolist()
    assert set(flips) == ({0, 1} if flip else {0})

    center = transforms.Compose([transforms.CenterCrop(32), transforms.PILToTensor()])
    images_list = open_dataset(config).val
    for index, ours in enumerate(validation_images(config)):
        with Image.open(images_list.path(index)) as image:
            np.testing.assert_array_equal(ours, center(image).permute(1, 2, 0).numpy())


def test_odd_files_are_read_as_pillow_reads_them(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        image = photo(40, 36)
        image.convert("L").save(folder / "grey.JPEG")
        image.convert("CMYK").save(folder / "cmyk.JPEG")
        image.save(folder / "progressive.jpg", progressive=True)
        image.save(folder / "really_a_png.JPEG", format="PNG")
        image.convert("L").save(folder / "grey.png")
        image.convert("P").save(folder / "palette.png")
        image.convert("RGBA").save(folder / "alpha.png")
        image.save(folder / "image.webp", lossless=True)
        image.save(folder / "image.BMP")
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: as in torchvision, the stored pixels count
        image.save(folder / "rotated.jpg", exif=exif)

    config = DataConfig(
        root=write_root(tmp_path / "data", write), image_size=36, crop_padding=0, num_threads=1, val_batch_size=10
    )
    images = open_dataset(config).val
    assert len(images) == 10
    for index, ours in enumerate(validation_images(config)):
        with Image.open(images.path(index)) as image:
            theirs = np.asarray(image.convert("RGB")).astype(np.int64)[2:38]
        assert np.abs(ours - theirs).max() <= 1, images.path(index)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def become_a_gif(path: Path) -> None:
    photo(40, 40).save(path, format="GIF")


@pytest.mark.parametrize("augmentation", ["pad_crop", "random_resized_crop"])
@pytest.mark.parametrize("damage", [truncate, become_a_gif, Path.unlink, Path.touch])
def test_an_image_that_cannot_be_decoded_is_named_at_once(
    tmp_path: Path, damage: Callable[[Path], None], augmentation: str
) -> None:
    def write(folder: Path) -> None:
        for index in range(20):
            photo(40, 40, index).save(folder / f"{index:02d}.jpg")

    root = write_root(tmp_path / "data", write)
    config = DataConfig(root=root, augmentation=augmentation, image_size=36, val_batch_size=4, num_threads=1)  # type: ignore[arg-type]
    loader = ValidationLoader(open_dataset(config), config, rank=0, world_size=1, local_world_size=1, device=CPU)
    broken = Path(root, "val/a/14.jpg")
    whole = broken.read_bytes()
    if damage == Path.touch:
        broken.write_bytes(b"")
    else:
        damage(broken)
    batches = iter(loader)
    assert sum(len(next(batches)[1]) for _ in range(3)) == 12
    with pytest.raises(ValueError, match=r"/val/a/14\.jpg .*\(.*on_bad_sample"):
        next(batches)

    broken.write_bytes(whole)
    assert sum(len(labels) for _, labels in loader) == 20


def test_a_damaged_training_image_is_named(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        for index in range(8):
            photo(40, 40, index).save(folder / f"{index}.jpg")

    root = write_root(tmp_path / "data", write)
    loader = train_loader(DataConfig(root=root, image_size=36, num_threads=1), 2)
    os.truncate(f"{root}/train/a/5.jpg", 700)
    with pytest.raises(ValueError, match=r"/train/a/5\.jpg "):
        torch.cat([images for images, _ in islice(loader.batches(), 8)])
