"""CIFAR-10 as class folders of PNG files."""

import functools
import os
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.launch.data.listing import Listing
from bitfleet.launch.data.unfinished import check_space, write_whole, written_before
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.manifest import Manifest, merge
from bitfleet.trainer.data.workers import run_jobs

LAYOUT = "CIFAR-10"
ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"

_BLOCK_IMAGES = 1000  # of one job
_FILE_BYTES = 4096  # that a PNG file of 32 x 32 pixels, about 2,300 bytes, takes on a disk
_BATCHES_FOLDER = ".batches"  # within DEST.unfinished, for a moment


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    pixels: npt.NDArray[np.uint8]
    """[N, 32, 32, 3]."""
    names: Sequence[str]
    """"train/<class>/00000.png"."""
    labels: Sequence[int]
    into: Path


def extract(source: Path, *, into: Path, num_workers: int) -> Listing:
    """Write the images of `source` to `into`/train/<class>/ and `into`/val/<class>/, or what is missing there.

    The files are numbered in the order of the batches, as torchvision's CIFAR10 is.

    Args:
        source: cifar-10-python.tar.gz or cifar-10-batches-py/.
        into: DEST.unfinished.
        num_workers: processes.

    Raises:
        ValueError: a file of `source` is missing or damaged, or the disk is too small.
    """
    if source.is_dir():
        splits, classes = _read(source)
    else:
        place = into / _BATCHES_FOLDER
        shutil.rmtree(place, ignore_errors=True)  # what a killed process left
        try:
            _unpack(source, place / FOLDER)
            splits, classes = _read(place / FOLDER, of=source)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    check_space(into, _FILE_BYTES * sum(len(labels) for _, labels in splits.values()))
    lists = {}
    for split, (pixels, labels) in splits.items():
        names = [f"{split}/{classes[label]}/{index:05d}.png" for index, label in enumerate(labels)]
        for name in classes:
            (into / split / name).mkdir(parents=True, exist_ok=True)
        blocks = [slice(start, start + _BLOCK_IMAGES) for start in range(0, len(labels), _BLOCK_IMAGES)]
        jobs = [_Job(pixels=pixels[block], names=names[block], labels=labels[block], into=into) for block in blocks]
        weights = [len(job.labels) for job in jobs]
        title = "training images" if split == "train" else "validation images"
        lists[split] = merge(run_jobs(_write_block, jobs, weights, num_workers=num_workers, title=title))
    return Listing(manifest=Manifest(train=lists["train"], val=lists["val"], classes=classes, layout=LAYOUT))


def _unpack(archive: Path, folder: Path) -> None:
    """Write the batches of an archive into `folder`."""
    folder.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isreg() and (content := tar.extractfile(member)):
                    with open(folder / PurePosixPath(member.name).name, "wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"the archive {archive} cannot be read ({error}): download it again") from None


def _read(
    folder: Path, of: Path | None = None
) -> tuple[dict[str, tuple[npt.NDArray[np.uint8], list[int]]], tuple[str, ...]]:
    """Pixels, uint8 [N, 32, 32, 3], and labels of both splits, and the classes, by torchvision, which checks the md5s."""
    from torchvision.datasets import CIFAR10

    try:
        train, val = map(functools.partial(CIFAR10, folder.parent), (True, False))
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        wrong = _first_damaged(folder)
        raise ValueError(
            f"{of or folder} is not CIFAR-10 as it was published: {f'{wrong} is missing or damaged' if wrong else error}; "
            f"download {ARCHIVE} again"
        ) from None
    return {"train": (train.data, train.targets), "val": (val.data, val.targets)}, tuple(train.classes)


def _first_damaged(folder: Path) -> str | None:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    return next((name for name, md5 in files if not check_integrity(folder / name, md5)), None)


def _write_block(job: _Job) -> ImageList:
    sizes = []
    for pixels, name in zip(job.pixels, job.names, strict=True):
        encoded = BytesIO()
        Image.fromarray(pixels).save(encoded, format="PNG")
        content = encoded.getvalue()
        if written_before(job.into / name, len(content)) is None:
            write_whole(job.into / name, content)
        sizes.append(len(content))
    height, width = job.pixels.shape[1:3]
    return ImageList(
        folder=job.into,
        names=np.array([os.fsencode(name) for name in job.names]),
        labels=np.array(job.labels, np.int64),
        heights=np.full(len(sizes), height, np.int32),
        widths=np.full(len(sizes), width, np.int32),
        sizes=np.array(sizes, np.int64),
    )
