"""A packed data set as a file an image."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.launch.data.packed_image import JPEG_FORMATS, packed_image
from bitfleet.launch.data.unfinished import write_whole
from bitfleet.trainer.data.images import ImageList, shard_and_member

_JPEG_SUFFIXES = (".jpeg", ".jpg")
_IMAGES_PER_JOB = 64


Packed = npt.NDArray[np.int64]
"""Height, width, bytes and offset in the shard (0 for a file) of packed images [N, 4]."""


class FilesJob(NamedTuple):
    """Some images that become files."""

    images: ImageList
    names: Sequence[str]
    """Of the files, relative to `folder`."""
    folder: Path
    """The unfinished folder."""
    short_side: int


def file_names(images: ImageList, split: str, classes: Sequence[str]) -> list[str]:
    """Name the file of each image: its path as it is, or `split`/<class>/<file> for one from a shard, with the suffix of a JPEG.

    Raises:
        ValueError: two images would have one name.
    """
    if images.offsets is None:
        wanted = [images.name(index) for index in range(len(images))]
    else:
        wanted = _names_from_shards(images, split, classes)
    taken = {name for name in wanted if name.lower().endswith(_JPEG_SUFFIXES)}
    names = []
    for name in wanted:
        if not name.lower().endswith(_JPEG_SUFFIXES):
            short, whole = os.path.splitext(name)[0] + ".JPEG", name + ".JPEG"
            name = whole if short in taken else short
            taken.add(name)
        names.append(name)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        first, second = [index for index, name in enumerate(names) if name == twice][:2]
        raise ValueError(
            f"the images {images.path(first)} and {images.path(second)} would both become {twice}: rename one and prepare again"
        )
    return names


def files_jobs(images: ImageList, names: Sequence[str], folder: Path, short_side: int) -> list[FilesJob]:
    """Cut the images, which become the files `names`, into jobs."""
    return [
        FilesJob(images.select(part), names[part[0] : part[-1] + 1], folder, short_side)
        for part in np.split(np.arange(len(images)), range(_IMAGES_PER_JOB, len(images), _IMAGES_PER_JOB))
        if len(part)
    ]


def pack_files(job: FilesJob) -> Packed:
    """Write the files of a job; those that are there already are kept."""
    paths = [job.folder / name for name in job.names]
    return np.array([_header(path) or _pack_file(job, index, path) for index, path in enumerate(paths)], np.int64)


def read_packed(images: ImageList, index: int, short_side: int) -> tuple[bytes, int, int]:
    """Read and pack image `index`: its JPEG, height and width.

    Raises:
        ValueError: it cannot be read or decoded.
    """
    try:
        return packed_image(images.read(index), short_side)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"the image {images.path(index)} cannot be packed ({reason}): run bitfleet data verify, which sets broken images "
            "aside, and start the command again, it goes on; one that only Pillow cannot read must be replaced"
        ) from None


def _pack_file(job: FilesJob, index: int, path: Path) -> tuple[int, int, int, int]:
    jpeg, height, width = read_packed(job.images, index, job.short_side)
    write_whole(path, jpeg)
    return height, width, len(jpeg), 0


def _header(path: Path) -> tuple[int, int, int, int] | None:
    """What is there already; None if that is nothing, or not a JPEG, as after a power failure."""
    try:
        with Image.open(path) as image:
            if image.format not in JPEG_FORMATS:
                return None
            return image.height, image.width, path.stat().st_size, 0
    except (OSError, SyntaxError, ValueError):
        return None


def _names_from_shards(images: ImageList, split: str, classes: Sequence[str]) -> list[str]:
    # A class that is not the name of a folder ("tench/fish", ".x") gives its label.
    folders = [name if re.fullmatch(r"[^./\0\t\n][^/\0\t\n]*", name) else f"class{k}" for k, name in enumerate(classes)]
    names: list[str] = []
    seen: set[str] = set()
    for index, label in enumerate(images.labels.tolist()):
        shard, member = shard_and_member(images.name(index))
        file = os.path.basename(member)
        name = f"{split}/{folders[label]}/{file}"
        if name in seen:  # keys are unique in a shard only
            name = f"{split}/{folders[label]}/{Path(shard).stem}-{file}"
        seen.add(name)
        names.append(name)
    return names
