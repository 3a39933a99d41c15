"""Lists of the images of a data set in class folders: paths, labels, heights and widths."""

import hashlib
import os
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.trainer.data.cache import cache_folder, exclusive
from bitfleet.trainer.data.decoding import FORMATS, opened
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.workers import run_jobs

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

_LAYOUT = (
    "expected ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG, or the DEST of `bitfleet data prepare SOURCE DEST`, which "
    "knows ILSVRC2012's archives, the Kaggle layout, WebDataset shards and CIFAR-10"
)
_READER_THREADS = 16  # headers wait for the disk or the network, not for the CPU
_JOB_FILES = 4096  # headers of one job: 256 for each thread
_SLOW_COUNT = 50_000  # images; from here on reading the headers takes long enough to say so


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassFolders:
    """What a scan of one split found: names, sizes and times, nothing read from the files yet."""

    folder: Path
    classes: tuple[str, ...]
    names: list[str]
    """"<class>/<file>" of each image."""
    labels: list[int]
    sizes: list[int]
    """Bytes."""
    mtimes_ns: list[int]


def scan_class_folders(folder: Path) -> ClassFolders:
    """List the images of one split, `folder`/<class>/<image>.

    A class is a subfolder; an image is a file in it whose name ends in one of IMAGE_SUFFIXES, in any case. Names that
    begin with a dot are left out (.ipynb_checkpoints, ._n01440764_18.JPEG).

    Raises:
        ValueError: `folder` is missing, has no class folder, or a class folder has no image in it, or what is no file.
    """
    classes = sorted((entry.name for entry in _entries(folder) if entry.is_dir()), key=os.fsencode)
    if not classes:
        raise ValueError(f"the data folder {folder} has no class folder in it; {_LAYOUT}")
    found = ClassFolders(folder=folder, classes=tuple(classes), names=[], labels=[], sizes=[], mtimes_ns=[])
    for label, class_name in enumerate(classes):
        entries = [
            entry
            for entry in _entries(folder / class_name)
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir(follow_symlinks=False)
        ]
        if not entries:
            raise ValueError(
                f"the class folder {folder / class_name} has no image in it (expected files that end in "
                f"{', '.join(IMAGE_SUFFIXES)}); fill it or remove it from train/ and val/"
            )
        for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
            try:
                status = entry.stat()
            except OSError as error:
                why = "a link to nothing" if isinstance(error, FileNotFoundError) else f"unreadable ({error.strerror})"
                raise ValueError(f"the image {entry.path} is {why}; restore or remove it") from None
            if not stat.S_ISREG(status.st_mode):  # to open a named pipe would never return
                raise ValueError(f"the image {entry.path} is not a regular file; remove it from its class folder")
            found.names.append(f"{class_name}/{entry.name}")
            found.labels.append(label)
            found.sizes.append(status.st_size)
            found.mtimes_ns.append(status.st_mtime_ns)
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"the data folder {folder} cannot be read ({error.strerror}); {_LAYOUT}") from None


def scan_root(root: Path) -> tuple[ClassFolders, ClassFolders]:
    """List the train and val splits of `root`.

    Raises:
        ValueError: `root`, train/ or val/ is missing or empty, or the two have different classes.
    """
    if not root.is_dir():
        raise ValueError(f"data.root={str(root)!r} does not exist; {_LAYOUT}")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise ValueError(f"data.root={str(root)!r} has no folder {split}/; {_LAYOUT}")
    train, val = scan_class_folders(root / "train"), scan_class_folders(root / "val")
    if different := sorted(set(train.classes) ^ set(val.classes), key=os.fsencode):
        present, absent = ("train", "val") if different[0] in train.classes else ("val", "train")
        raise ValueError(
            f"data.root={str(root)!r} has {len(train.classes)} classes in train/ and {len(val.classes)} in val/, which "
            f"must be the same: {different[0]!r} is in {present}/ only; add it to {absent}/ or remove it from {present}/"
        )
    return train, val


def load_image_list(found: ClassFolders) -> ImageList:
    """Complete a scan with heights and widths, read from the headers once and kept in the cache folder.

    Raises:
        ValueError: The header of an image cannot be read; the path is named.
    """
    heights, widths = _cached_image_sizes(found)
    prefix = os.fsencode(found.folder.name) + b"/"
    return ImageList(
        folder=found.folder.parent,
        names=np.array([prefix + os.fsencode(name) for name in found.names]),
        labels=np.array(found.labels, np.int64),
        heights=heights,
        widths=widths,
        sizes=np.array(found.sizes, np.int64),
    )


def _cached_image_sizes(found: ClassFolders) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(found.folder)) + b"\n")
    digest.update(b"".join(os.fsencode(name) + b"\n" for name in found.names))
    digest.update(np.array([found.sizes, found.mtimes_ns], np.int64).tobytes())
    file = cache_folder() / f"image-sizes-{digest.hexdigest()[:32]}.npz"
    with exclusive(file):  # the other ranks of this machine wait here and then read the file
        if not file.exists() or not file.stat().st_size:  # none, or what a power failure left
            heights, widths = _read_image_sizes([f"{found.folder}/{name}" for name in found.names])
            unfinished = file.with_name(f".tmp-{file.name}")
            np.savez(unfinished, heights=heights, widths=widths)
            unfinished.rename(file)
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["heights"], arrays["widths"]


def _read_image_sizes(paths: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    if len(paths) >= _SLOW_COUNT:
        print(f"bitfleet: reading the sizes of {len(paths)} images, once", file=sys.stderr, flush=True)
    Image.init()  # before the threads: they would all load Pillow's plugins at the same time
    blocks = [paths[start : start + 256] for start in range(0, len(paths), 256)]
    with ThreadPoolExecutor(_READER_THREADS) as pool:
        futures = [pool.submit(_read_block, block) for block in blocks]
        try:
            sizes = np.concatenate([future.result() for future in futures])
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise
    return sizes[:, 0].copy(), sizes[:, 1].copy()


def _read_block(paths: Sequence[str]) -> npt.NDArray[np.int32]:
    sizes = np.empty((len(paths), 2), np.int32)
    for index, path in enumerate(paths):
        try:
            sizes[index] = header_size(path)
        except ValueError as error:
            raise ValueError(
                f"the image {path} cannot be read ({error}); replace the file, or remove it from its class folder"
            ) from None
    return sizes


def header_size(file: str | IO[bytes]) -> tuple[int, int]:
    """Height and width in pixels from the header of an image, at a path or in an open file.

    Raises:
        ValueError: it cannot be read, is too large, or its format is not read; the message is the bare reason.
    """
    try:
        with opened(file) as image:
            if image.format not in FORMATS:
                raise ValueError(f"it is a {image.format} file, which bitfleet does not read")
            return image.height, image.width
    except OSError as error:
        raise ValueError(str(error)) from None


def list_files(
    folder: Path, names: Sequence[str], labels: Sequence[int], sizes: Sequence[int], *, num_workers: int, title: str
) -> ImageList:
    """Complete a list of image files, names relative to `folder`, with heights and widths; all workers read headers.

    Raises:
        ValueError: The header of an image cannot be read; the path is named.
    """
    jobs = [
        [f"{folder}/{name}" for name in names[start : start + _JOB_FILES]] for start in range(0, len(names), _JOB_FILES)
    ]
    found = run_jobs(_read_image_sizes, jobs, [len(job) for job in jobs], num_workers=num_workers, title=title)
    return ImageList(
        folder=folder,
        names=np.array([os.fsencode(name) for name in names]),
        labels=np.array(labels, np.int64),
        heights=np.concatenate([heights for heights, _ in found]),
        widths=np.concatenate([widths for _, widths in found]),
        sizes=np.array(sizes, np.int64),
    )
