"""Layout: CIFAR-10's python archive, written as class folders of PNG files."""

import functools
import gzip
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.source import TITLES, Listing, Source, merge, register_layout
from bitfleet.launch.data.unfinished import check_space, shape_if_written, write_unsynced
from bitfleet.launch.data.workers import run_jobs
from bitfleet.trainer.data.image_list import ImageList, Manifest, build_list

ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"

_JOB_IMAGES = 1000
_FILE_BYTES = 4096  # disk space of a PNG file of 32 x 32 pixels, about 2,300 bytes
_BATCHES_FOLDER = ".batches"  # temporary, in DEST.unfinished


class _Job(NamedTuple):
    pixels: npt.NDArray[np.uint8]
    """[N, 32, 32, 3]."""
    names: Sequence[str]
    """"train/<class>/00000.png"."""
    labels: Sequence[int]
    into: Path


@register_layout(f"{ARCHIVE} or {FOLDER}/", archives=(ARCHIVE,))
def detect(source: Path) -> Source | None:
    """Return CIFAR-10 in `source`, which may be the archive, or None."""
    # The batches first: torchvision leaves the archive next to them.
    places = [source] if source.name in (FOLDER, ARCHIVE) else [source / FOLDER, source / ARCHIVE]
    for place in places:
        if place.exists():
            make = functools.partial(extract, place)
            return Source(layout="CIFAR-10", make=make, extracted=(place,), counts=imagenet.CIFAR10)
    return None


def extract(source: Path, *, into: Path, num_workers: int) -> Listing:
    """Write the missing images of `source` to `into`/<split>/<class>/.

    Files are numbered in the order of the batches, which is that of torchvision's CIFAR10.

    Args:
        source: cifar-10-python.tar.gz or cifar-10-batches-py/.
        into: DEST.unfinished.
        num_workers: Number of processes.

    Raises:
        ValueError: A file of `source` is missing or damaged, or the disk is too small.
    """
    if source.is_dir():
        splits, classes = _read(source, source)
    else:
        unpacked = into / _BATCHES_FOLDER
        shutil.rmtree(unpacked, ignore_errors=True)  # from a killed process
        try:
            _unpack(source, unpacked / FOLDER)
            splits, classes = _read(unpacked / FOLDER, source)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
    check_space(into, _FILE_BYTES * sum(len(labels) for _, labels in splits.values()))
    lists = {}
    for split, (pixels, labels) in splits.items():
        names = [f"{split}/{classes[label]}/{index:05d}.png" for index, label in enumerate(labels)]
        for name in classes:
            (into / split / name).mkdir(parents=True, exist_ok=True)
        blocks = [slice(start, start + _JOB_IMAGES) for start in range(0, len(labels), _JOB_IMAGES)]
        jobs = [_Job(pixels[block], names[block], labels[block], into) for block in blocks]
        weights = [len(job.labels) for job in jobs]
        lists[split] = merge(run_jobs(_write_block, jobs, weights, num_workers=num_workers, title=TITLES[split]))
    return Listing(manifest=Manifest(train=lists["train"], val=lists["val"], classes=classes, layout="CIFAR-10"))


def _unpack(archive: Path, folder: Path) -> None:
    """Write the batches of an archive into `folder`."""
    folder.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isreg() and (content := tar.extractfile(member)):
                    with open(folder / PurePosixPath(member.name).name, "wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"the archive {archive} cannot be read ({error}): download it again") from None


def _read(folder: Path, source: Path) -> tuple[dict[str, tuple[npt.NDArray[np.uint8], list[int]]], tuple[str, ...]]:
    """Return pixels, uint8 [N, 32, 32, 3], and labels of both splits, and the classes.

    torchvision reads them and checks the md5s.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    try:
        train, val = map(functools.partial(CIFAR10, folder.parent), (True, False))
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        damaged = next((name for name, md5 in files if not check_integrity(folder / name, md5)), None)
        raise ValueError(
            f"{source} is not CIFAR-10 as it was published: "
            f"{f'{damaged} is missing or damaged' if damaged else error}; download {ARCHIVE} again"
        ) from None
    return {"train": (train.data, train.targets), "val": (val.data, val.targets)}, tuple(train.classes)


def _write_block(job: _Job) -> ImageList:
    sizes = []
    for pixels, name in zip(job.pixels, job.names, strict=True):
        encoded = BytesIO()
        Image.fromarray(pixels).save(encoded, format="PNG")
        content = encoded.getvalue()
        if shape_if_written(job.into / name, len(content)) is None:
            write_unsynced(job.into / name, content)
        sizes.append(len(content))
    shapes = [job.pixels.shape[1:3]] * len(sizes)
    return build_list(job.into, job.names, job.labels, shapes, sizes)
