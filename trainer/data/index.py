"""Lists of image files: paths, labels, and the heights and widths from their headers."""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.trainer.data.cache import cache_folder, exclusive
from bitfleet.trainer.data.class_folders import ClassFolders
from bitfleet.trainer.data.class_names import shown
from bitfleet.trainer.data.decoding import FORMATS, opened
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.workers import run_jobs

_READER_THREADS = 16  # headers wait for the disk or the network, not for the CPU
_JOB_FILES = 4096  # headers of one job: 256 for each thread
_SLOW_COUNT = 50_000  # images; from here on reading the headers takes long enough to say so
NUM_REASONS = 20
"""Images that an error names; of more it says how many and where they are named."""

_Headers = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], dict[int, str]]
"""Heights and widths; by index, why a header cannot be read: both are 0 there."""


def load_image_list(found: ClassFolders) -> tuple[ImageList, dict[str, str]]:
    """Complete a scan with heights and widths, read from the headers once and kept in the cache folder.

    Returns:
        The list, and why the header of an image cannot be read, for those of 0 x 0 pixels in it: path -> reason.
    """
    heights, widths, reasons = _cached_image_sizes(found)
    prefix = os.fsencode(found.folder.name) + b"/"
    images = ImageList(
        folder=found.folder.parent,
        names=np.array([prefix + os.fsencode(name) for name in found.names]),
        labels=np.array(found.labels, np.int64),
        heights=heights,
        widths=widths,
        sizes=np.array(found.sizes, np.int64),
    )
    return images, {images.path(index): reason for index, reason in reasons.items()}


def unreadable_images(reasons: Mapping[str, str], fix: str, rest: str = "") -> str:
    """The sentence about images that cannot be read, with the first of them.

    Args:
        reasons: path -> reason; at least one.
        fix: what can be done about it.
        rest: where the others are named, if they are not all in the sentence.
    """
    if len(reasons) == 1:
        ((path, reason),) = reasons.items()
        return f"the image {shown(path)} cannot be read ({reason}); {fix}"
    named = "; ".join(f"{shown(path)} ({reason})" for path, reason in islice(reasons.items(), NUM_REASONS))
    more = f"; and {len(reasons) - NUM_REASONS:,} more{rest}" if len(reasons) > NUM_REASONS else ""
    return f"{len(reasons):,} images cannot be read; {fix}: {named}{more}"


def _cached_image_sizes(found: ClassFolders) -> _Headers:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(found.folder)) + b"\n")
    digest.update(b"".join(os.fsencode(name) + b"\n" for name in found.names))
    digest.update(np.array([found.sizes, found.mtimes_ns], np.int64).tobytes())
    file = cache_folder() / f"image-sizes-{digest.hexdigest()[:32]}.npz"
    with exclusive(file):  # the other ranks of this machine wait here and then read the file
        if not file.exists() or not file.stat().st_size:  # none, or what a power failure left
            heights, widths, reasons = _read_image_sizes([f"{found.folder}/{name}" for name in found.names])
            if reasons:
                return heights, widths, reasons
            unfinished = file.with_name(f".tmp-{file.name}")
            np.savez(unfinished, heights=heights, widths=widths)
            unfinished.rename(file)
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["heights"], arrays["widths"], {}


def _read_image_sizes(paths: Sequence[str]) -> _Headers:
    if len(paths) >= _SLOW_COUNT:
        print(f"bitfleet: reading the sizes of {len(paths)} images, once", file=sys.stderr, flush=True)
    Image.init()  # before the threads: they would all load Pillow's plugins at the same time
    blocks = [paths[start : start + 256] for start in range(0, len(paths), 256)]
    with ThreadPoolExecutor(_READER_THREADS) as pool:
        results = list(pool.map(_read_block, blocks))
    sizes = np.concatenate([sizes for sizes, _ in results])
    reasons = {256 * block + index: why for block, (_, found) in enumerate(results) for index, why in found.items()}
    return sizes[:, 0].copy(), sizes[:, 1].copy(), reasons


def _read_block(paths: Sequence[str]) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
    sizes, reasons = np.zeros((len(paths), 2), np.int32), {}
    for index, path in enumerate(paths):
        try:
            sizes[index] = header_size(path)
        except ValueError as error:
            reasons[index] = str(error)
    return sizes, reasons


def header_size(file: str | IO[bytes]) -> tuple[int, int]:
    """Height and width in pixels from the header of an image, at a path or in an open file.

    Raises:
        ValueError: it cannot be read, is too large, or its format is not read; the message is the bare reason.
    """
    try:
        with opened(file) as image:
            is_float = image.format == "PPM" and image.mode == "F"
            if image.format not in FORMATS or is_float:
                raise ValueError(f"it is a {'PFM' if is_float else image.format} file, which bitfleet does not read")
            return image.height, image.width
    except FileNotFoundError:
        is_link = isinstance(file, str) and os.path.islink(file)
        raise ValueError("a link to nothing" if is_link else "the file is missing") from None
    except Exception as error:  # a broken header raises nearly anything in Pillow
        raise ValueError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


def list_files(
    folder: Path, names: Sequence[str], labels: Sequence[int], sizes: Sequence[int], *, num_workers: int, title: str
) -> tuple[ImageList, dict[str, str]]:
    """Complete a list of image files, names relative to `folder`, with heights and widths; all workers read headers.

    Returns:
        The list, and why the header of an image cannot be read, for those of 0 x 0 pixels in it: name -> reason.
    """
    jobs = [
        [f"{folder}/{name}" for name in names[start : start + _JOB_FILES]] for start in range(0, len(names), _JOB_FILES)
    ]
    found = run_jobs(_read_image_sizes, jobs, [len(job) for job in jobs], num_workers=num_workers, title=title)
    images = ImageList(
        folder=folder,
        names=np.array([os.fsencode(name) for name in names]),
        labels=np.array(labels, np.int64),
        heights=np.concatenate([heights for heights, _, _ in found]),
        widths=np.concatenate([widths for _, widths, _ in found]),
        sizes=np.array(sizes, np.int64),
    )
    reasons = {
        names[job * _JOB_FILES + index]: reason
        for job, (_, _, of_job) in enumerate(found)
        for index, reason in of_job.items()
    }
    return images, reasons
