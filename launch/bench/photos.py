"""Images to measure loaders on: photos, synthetic or of a data set, and small images."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from bitfleet.trainer.data import DataConfig, TrainLoader, open_dataset
from bitfleet.trainer.data.cache import cache_folder
from bitfleet.trainer.data.dataset import Dataset
from bitfleet.trainer.data.request import Batch
from bitfleet.trainer.run.files import write_atomically

SHORT_SIDE, SMALL_SIZE = 256, 32
ONE_RANK: dict[str, Any] = {"rank": 0, "world_size": 1, "local_world_size": 1}
_SIZES = [(500, 375), (500, 375), (375, 500), (500, 333), (480, 360), (500, 375), (333, 500), (400, 300)]
"""Width and height."""


class Photo(NamedTuple):
    """A JPEG and its class."""

    class_name: str
    encoded: bytes


def train_batches(dataset: Dataset, config: DataConfig, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Return the training batches of a run on one rank."""
    sizes = {"global_batch_size": batch_size, "num_replicas": 1}
    return TrainLoader(dataset, config, seed=0, device=device, **sizes, **ONE_RANK).batches()


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


def _jpeg(image: Image.Image, quality: int, subsampling: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def find_photos(root: str | Path | None, num_images: int, num_workers: int) -> list[Photo]:
    """Choose JPEGs evenly among the training images of `root`; None: synthetic ones in the cache.

    Raises:
        ValueError: `root` is not a data set, or has no JPEG in grey or RGB among the chosen images.
    """
    if root is None:
        with ThreadPoolExecutor(num_workers) as pool:
            return [Photo("a", encoded) for encoded in pool.map(_cached_photo, range(num_images))]
    dataset = open_dataset(DataConfig(root=str(root)))
    images = dataset.train
    positions = np.unique(np.linspace(0, len(images) - 1, num_images).astype(np.int64)).tolist()
    photos = [Photo(dataset.classes[images.labels[index]], images.read(index)) for index in positions]
    if not (plain := [photo for photo in photos if _is_plain_jpeg(photo.encoded)]):
        raise ValueError(
            f"--root {root} has no JPEG in grey or RGB among {len(positions)} training images; bench loader needs them"
        )
    return plain


def _cached_photo(index: int) -> bytes:
    file = cache_folder() / "bench-photos" / f"{index:07d}.jpg"
    if not file.exists():
        write_atomically(file, make_photo(index))
    return file.read_bytes()


def _is_plain_jpeg(encoded: bytes) -> bool:
    with Image.open(io.BytesIO(encoded)) as image:
        return image.format == "JPEG" and image.mode in ("L", "RGB")


def write_class_folders(photos: list[Photo], folder: Path) -> Path:
    """Write the photos to `folder`/train/CLASS/, so into the page cache, one per class to val."""
    for index, (class_name, encoded) in enumerate(photos):
        for split, name in (("train", f"{index:07d}.jpg"), ("val", "first.jpg")):
            file = folder / split / class_name / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.write_bytes(encoded)
    return folder


def shrink(photo: Photo) -> Photo:
    """Return a copy with a short side of SHORT_SIDE pixels and quality 90."""
    with Image.open(io.BytesIO(photo.encoded)) as image:
        size = (image.width * SHORT_SIDE // min(image.size), image.height * SHORT_SIDE // min(image.size))
        small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return photo._replace(encoded=_jpeg(small, 90, "4:2:0"))


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
