"""Photos to measure loaders on: from a data set or synthetic, in class folders, and shrunk."""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.launch.data.manifest import write_manifest
from bitfleet.trainer.data import DataConfig, open_dataset
from bitfleet.trainer.data.cache import cache_folder, exclusive
from bitfleet.trainer.data.image_list import FILE, ImageList, Manifest

SHORT_SIDE, SMALL_SIZE = 256, 32
_SIZES = [(500, 375), (500, 375), (375, 500), (500, 333), (480, 360), (500, 375), (333, 500), (400, 300)]
"""Width and height."""
Size = tuple[int, int, int]
"""Height and width in pixels, and bytes, of a file."""


class Photos(NamedTuple):
    """Photos and the names of their classes."""

    train: ImageList
    classes: tuple[str, ...]
    synthetic: bool


def make_photo(index: int) -> bytes:
    """Return synthetic photo `index`, a JPEG of 500 x 375 pixels and 110 kB, equal everywhere.

    Noise at every scale, weak in colour, whose amplitude falls so slowly with its frequency that
    sizes are those of ImageNet's photos: 110 kB, 62 kB at quality 90 and 4:2:0, 30 kB at 256
    pixels. As in ImageNet, 76 % are 4:4:4, the rest 4:2:0. So decoding costs about what it does for
    real photos: torchvision-v2-uint8 takes 1.65 times the CPU time of the decoder alone, PIL to
    float32 2.8 times; with real photos, on another CPU, it was 1.6 and 2.6 times.
    """
    rng = np.random.default_rng(index)
    size = _SIZES[index % len(_SIZES)]
    planes: npt.NDArray[np.float32] = np.zeros((3, size[1], size[0]), np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256, 512):
        noise = rng.standard_normal((3, cells, cells)).astype(np.float32) * np.float32((2 / cells) ** 0.4)
        planes += [np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)) for plane in noise]
    planes *= np.array([1, 0.3, 0.3], np.float32)[:, None, None] * (60 / planes[0].std())
    pixels = np.clip(planes + 128, 0, 255).astype(np.uint8)
    image = Image.merge("YCbCr", [Image.fromarray(plane) for plane in pixels]).convert("RGB")
    return _jpeg(image, 95, "4:4:4" if index % 25 < 19 else "4:2:0")


def find_photos(root: str | None, num_images: int, num_workers: int) -> Photos:
    """Choose JPEGs evenly among the training images of `root`; None: synthetic ones in the cache.

    Raises:
        ValueError: `root` is not a data set, or has no JPEG in grey or RGB among the chosen images.
    """
    dataset = open_dataset(DataConfig(root=root or str(_synthetic_photos(num_images, num_workers))))
    if root is None:
        return Photos(dataset.train.select(np.arange(num_images)), dataset.classes, True)
    positions = np.unique(np.linspace(0, len(dataset.train) - 1, num_images).astype(np.int64))
    chosen = [index for index in positions.tolist() if _is_plain_jpeg(dataset.train.read(index))]
    if not chosen:
        raise ValueError(
            f"--root {root} has no JPEG in grey or RGB among {len(positions)} training images; bench loader needs them"
        )
    return Photos(dataset.train.select(np.array(chosen)), dataset.classes, False)


def write_class_folders(photos: Photos, folder: Path) -> Photos:
    """Copy the photos to `folder`/train/CLASS/ with a manifest, and so into the page cache.

    Classes without a photo are left out, since other loaders refuse empty folders.
    """
    images = photos.train
    labels = np.unique(images.labels)
    classes = tuple(photos.classes[label] for label in labels.tolist())
    names = [f"train/{photos.classes[label]}/{index:07d}.jpg" for index, label in enumerate(images.labels.tolist())]
    sizes = []
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sizes.append(write_jpeg(f"{folder}/{name}", images.read(index)))
    copied = image_list(folder, names, np.searchsorted(labels, images.labels), sizes)
    return _with_manifest(copied, classes, photos.synthetic)


def write_small_copies(photos: Photos, folder: Path, num_workers: int) -> Photos:
    """Write copies with a short side of SHORT_SIDE pixels as JPEGs of quality 90."""
    images = photos.train
    for class_name in photos.classes:
        (folder / "train" / class_name).mkdir(parents=True)
    names = [images.name(index) for index in range(len(images))]
    targets = [f"{folder}/{name}" for name in names]
    with ThreadPoolExecutor(num_workers) as pool:
        sizes = list(pool.map(_shrink, map(images.path, range(len(images))), targets))
    return _with_manifest(image_list(folder, names, images.labels, sizes), photos.classes, photos.synthetic)


def write_jpeg(path: str, encoded: bytes) -> Size:
    """Write an encoded image."""
    Path(path).write_bytes(encoded)
    with Image.open(io.BytesIO(encoded)) as image:
        return image.height, image.width, len(encoded)


def image_list(folder: Path, names: Sequence[str], labels: npt.NDArray[np.int64], sizes: Sequence[Size]) -> ImageList:
    """Return the list of the files `folder`/name."""
    heights, widths, num_bytes = np.array(sizes, np.int64).T
    return ImageList(
        folder=folder,
        names=np.array([os.fsencode(name) for name in names]),
        labels=labels,
        heights=heights.astype(np.int32),
        widths=widths.astype(np.int32),
        sizes=num_bytes,
    )


def _synthetic_photos(num_images: int, num_workers: int) -> Path:
    folder = cache_folder() / "bench-photos"
    with exclusive(folder):
        if not (folder / FILE).exists() or len(open_dataset(DataConfig(root=str(folder))).train) < num_images:
            (folder / "train" / "a").mkdir(parents=True, exist_ok=True)
            print("making synthetic photos, once ...", flush=True)
            names = [f"train/a/{index:07d}.jpg" for index in range(num_images)]
            targets = [f"{folder}/{name}" for name in names]
            with ThreadPoolExecutor(num_workers) as pool:
                sizes = list(pool.map(write_jpeg, targets, pool.map(make_photo, range(num_images))))
            _with_manifest(image_list(folder, names, np.zeros(num_images, np.int64), sizes), ("a",), True)
    return folder


def _shrink(source: str, target: str) -> Size:
    with Image.open(source) as image:
        size = (image.width * SHORT_SIDE // min(image.size), image.height * SHORT_SIDE // min(image.size))
        small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return write_jpeg(target, _jpeg(small, 90, "4:2:0"))


def _jpeg(image: Image.Image, quality: int, subsampling: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def _is_plain_jpeg(encoded: bytes) -> bool:
    with Image.open(io.BytesIO(encoded)) as image:
        return image.format == "JPEG" and image.mode in ("L", "RGB")


def _with_manifest(images: ImageList, classes: tuple[str, ...], synthetic: bool) -> Photos:
    val = images.select(np.arange(1))  # a data set must have one; nothing is validated
    write_manifest(Manifest(train=images, val=val, classes=classes, layout="bench loader"), images.folder)
    return Photos(images, classes, synthetic)


def write_small_images(root: Path, num_images: int) -> Path:
    """Write small images in ten class folders, and one validation image per class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_images), ("val", 10)):
        for index in range(count):
            folder = root / split / str(index % 10)
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((SMALL_SIZE, SMALL_SIZE), Image.Resampling.BICUBIC), np.int16)
            pixels = np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:06d}.png")
    return root
