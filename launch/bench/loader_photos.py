"""The photos that loaders are measured on: those of a data set, or made-up ones; in class folders, and at 256 pixels."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.launch.data.manifest import write_manifest
from bitfleet.launch.data.workers import run_jobs
from bitfleet.trainer.data import DataConfig, open_dataset
from bitfleet.trainer.data.cache import cache_folder, exclusive
from bitfleet.trainer.data.image_list import FILE, ImageList, Manifest

SHORT_SIDE = 256
_SIZES = (
    (500, 375),
    (500, 375),
    (375, 500),
    (500, 333),
    (480, 360),
    (500, 375),
    (333, 500),
    (400, 300),
)  # width, height
_QUALITY = 95
_JOB = 16  # images

Item = TypeVar("Item")
Facts = tuple[int, int, int]
"""Height and width in pixels, and bytes, of a file."""


class Photos(NamedTuple):
    """The photos of a run of the benchmark."""

    train: ImageList
    classes: tuple[str, ...]
    made_up: bool


def make_photo(index: int) -> bytes:
    """A made-up photo, number `index`, as a JPEG of about 500 x 375 pixels and 110 kB; the same on every machine.

    Noise at every scale, whose amplitude falls so slowly with its frequency, and which is so weak in colour, that three sizes
    are those that ImageNet's photos have: 110 kB as they are, 62 kB at quality 90 and 4:2:0, 30 kB at 256 pixels. As in
    ImageNet, 76 % are 4:4:4, the rest 4:2:0. What a decoder does hangs on pixels, bits and chroma, so these cost about what
    real ones do: torchvision-v2-uint8 takes 1.65 times the CPU time of the decoder alone, PIL to float32 2.8 times; with real
    ones, on another CPU, it was 1.6 and 2.6 times.
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
    return _jpeg(image, _QUALITY, "4:4:4" if index % 25 < 19 else "4:2:0")


def find_photos(root: str | None, num_images: int, num_workers: int) -> Photos:
    """Choose `num_images` JPEGs, evenly spread over the training images of `root`; made-up ones if it is None.

    What is made is kept in the cache folder.

    Raises:
        ValueError: `root` is no data set, or has no JPEG in grey or RGB among those that were looked at.
    """
    if root is None:
        dataset = open_dataset(DataConfig(root=str(_made_up(num_images, num_workers))))
        return Photos(dataset.train.select(np.arange(num_images)), dataset.classes, True)
    dataset = open_dataset(DataConfig(root=root))
    positions = np.unique(np.linspace(0, len(dataset.train) - 1, num_images).astype(np.int64))
    chosen = [index for index in positions.tolist() if _is_plain_jpeg(dataset.train.read(index))]
    if not chosen:
        raise ValueError(
            f"--root {root} has no JPEG in grey or RGB among {len(positions)} training images; bench loader needs them"
        )
    return Photos(dataset.train.select(np.array(chosen)), dataset.classes, False)


def write_class_folders(photos: Photos, folder: Path) -> Photos:
    """Copy the photos to `folder`/train/<class>/, with a manifest, so that every loader finds the same files.

    Classes without a photo are left out, since other loaders refuse empty folders. All files are in the page cache afterwards.
    """
    images = photos.train
    labels = np.unique(images.labels)
    classes = tuple(photos.classes[label] for label in labels.tolist())
    for class_name in classes:
        (folder / "train" / class_name).mkdir(parents=True)
    names = [f"train/{photos.classes[label]}/{index:07d}.jpg" for index, label in enumerate(images.labels.tolist())]
    for index, name in enumerate(names):
        (folder / name).write_bytes(images.read(index))
    copied = ImageList(
        folder=folder,
        names=np.array([os.fsencode(name) for name in names]),
        labels=np.searchsorted(labels, images.labels),
        heights=images.heights,
        widths=images.widths,
        sizes=images.sizes,
    )
    _write_manifest(copied, classes, folder)
    return Photos(copied, classes, photos.made_up)


def write_small_copies(photos: Photos, folder: Path, num_workers: int) -> Photos:
    """Write what `write_class_folders` wrote anew, the short side SHORT_SIDE pixels, as JPEGs of quality 90."""
    images = photos.train
    for class_name in photos.classes:
        (folder / "train" / class_name).mkdir(parents=True)
    paths = [(images.path(index), f"{folder}/{images.name(index)}") for index in range(len(images))]
    facts = _run(_shrink, paths, num_workers, f"photos at {SHORT_SIDE} pixels")
    small = image_list(folder, images.names, images.labels, facts)
    _write_manifest(small, photos.classes, folder)
    return Photos(small, photos.classes, photos.made_up)


def write_jpeg(path: str, encoded: bytes) -> Facts:
    """Write an encoded image."""
    Path(path).write_bytes(encoded)
    with Image.open(io.BytesIO(encoded)) as image:
        return image.height, image.width, len(encoded)


def image_list(
    folder: Path,
    names: npt.NDArray[np.bytes_],
    labels: npt.NDArray[np.int64],
    facts: Sequence[Facts],
) -> ImageList:
    """The list of the files `folder`/name."""
    heights, widths, sizes = np.array(facts, np.int64).T
    return ImageList(
        folder=folder,
        names=names,
        labels=labels,
        heights=heights.astype(np.int32),
        widths=widths.astype(np.int32),
        sizes=sizes,
    )


def _made_up(num_images: int, num_workers: int) -> Path:
    folder = cache_folder() / "bench-photos"
    with exclusive(folder):
        if not (folder / FILE).exists() or len(open_dataset(DataConfig(root=str(folder))).train) < num_images:
            (folder / "train" / "a").mkdir(parents=True, exist_ok=True)
            names = [f"train/a/{index:07d}.jpg" for index in range(num_images)]
            paths = [(index, f"{folder}/{name}") for index, name in enumerate(names)]
            facts = _run(_make, paths, num_workers, "made-up photos, once")
            labels = np.zeros(num_images, np.int64)
            images = image_list(folder, np.array([os.fsencode(name) for name in names]), labels, facts)
            _write_manifest(images, ("a",), folder)
    return folder


def _run(
    function: Callable[[Sequence[Item]], list[Facts]], items: Sequence[Item], num_workers: int, title: str
) -> list[Facts]:
    jobs = [items[start : start + _JOB] for start in range(0, len(items), _JOB)]
    done = run_jobs(function, jobs, [len(job) for job in jobs], num_workers=num_workers, title=title)
    return [facts for block in done for facts in block]


def _make(job: Sequence[tuple[int, str]]) -> list[Facts]:
    return [write_jpeg(path, make_photo(index)) for index, path in job]


def _shrink(job: Sequence[tuple[str, str]]) -> list[Facts]:
    facts = []
    for source, target in job:
        with Image.open(source) as image:
            short = min(image.size)
            size = (image.width * SHORT_SIDE // short, image.height * SHORT_SIDE // short)
            small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        facts.append(write_jpeg(target, _jpeg(small, 90, "4:2:0")))
    return facts


def _jpeg(image: Image.Image, quality: int, subsampling: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def _is_plain_jpeg(encoded: bytes) -> bool:
    with Image.open(io.BytesIO(encoded)) as image:
        return image.format == "JPEG" and image.mode in ("L", "RGB")


def _write_manifest(images: ImageList, classes: tuple[str, ...], folder: Path) -> None:
    val = images.select(np.arange(1))  # a data set must have one; nothing is validated
    write_manifest(Manifest(train=images, val=val, classes=classes, layout="bench loader"), folder)
