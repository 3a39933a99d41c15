"""WebDataset shards, indexed where they lie: the images are read from within the archives."""

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from bitfleet.trainer.data import imagenet
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.index import IMAGE_SUFFIXES, header_size
from bitfleet.trainer.data.manifest import Manifest, concatenate
from bitfleet.trainer.data.tar_members import Member, list_members
from bitfleet.trainer.data.workers import run_jobs

LAYOUT = "WebDataset shards"
CLASSES_FILE = "classes.txt"

_SHARD_IMAGES = 1000  # a guess for the progress bar; only the shard knows
_MOST_CLASSES = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    folder: Path
    shard: str
    """Path below `folder`."""
    num_classes: int
    """Labels must be below it."""


def index(folder: Path, train: Sequence[str], val: Sequence[str], *, num_workers: int) -> Manifest:
    """List the images of shards in the order of the shards, and within each in its own order.

    A sample is KEY.jpg (or another suffix of an image) with KEY.cls, the label as text, or KEY.json with "label" or "cls".
    Names of the classes: a line each in classes.txt beside the shards, else ImageNet's for labels 0 .. 999, else the numbers.

    Args:
        folder: what the paths are relative to.
        train: shards of the training images.
        val: shards of the validation images.
        num_workers: processes.

    Raises:
        ValueError: a shard is damaged, or an image in it is unreadable or has no label, or a label that no class has.
    """
    named = _read_classes(folder / CLASSES_FILE)
    lists = []
    for shards, title in ((train, "training images (estimated)"), (val, "validation images (estimated)")):
        jobs = [
            _Job(folder=folder, shard=shard, num_classes=len(named) if named else _MOST_CLASSES) for shard in shards
        ]
        weights = [_SHARD_IMAGES] * len(jobs)
        lists.append(concatenate(run_jobs(_index_shard, jobs, weights, num_workers=num_workers, title=title)))
    train_list, val_list = lists
    if named:
        classes = named
    else:
        _check_range(train_list, val_list)
        classes = tuple(map(str, range(int(train_list.labels.max()) + 1)))
        if len(classes) == len(imagenet.synsets()):
            classes = imagenet.synsets()
    return Manifest(train=train_list, val=val_list, classes=classes, layout=LAYOUT)


def _read_classes(file: Path) -> tuple[str, ...] | None:
    if not file.exists():
        return None
    classes = tuple(line.strip() for line in file.read_text().splitlines())
    if not classes or not all(classes) or len(set(classes)) != len(classes):
        raise ValueError(f"{file} must name every class once, a line each, in the order of the labels")
    return classes


def _check_range(train: ImageList, val: ImageList) -> None:
    """Without a list of classes the labels of the training images are the classes."""
    largest = int(train.labels.argmax())
    if train.labels[largest] >= len(train):
        raise ValueError(
            f"the image {train.path(largest)} has the label {train.labels[largest]}, and there are {len(train)} training images: "
            "labels must count the classes from 0"
        )
    if (odd := ~np.isin(val.labels, train.labels)).any():
        first = int(odd.argmax())
        raise ValueError(
            f"the image {val.path(first)} has the label {val.labels[first]}, which no training image has: correct the label, "
            f"or name the classes in {CLASSES_FILE} beside the shards, a line each"
        )


def _index_shard(job: _Job) -> ImageList:
    path = job.folder / job.shard
    images, labels = _samples(path, list_members(path))
    shapes, numbers = [], []
    with open(path, "rb") as file, tarfile.open(path, "r:") as tar:
        for key, member in images.items():
            what = f"the image {member.name} in the shard {path}"
            if (beside := labels.get(key)) is None:
                raise ValueError(
                    f"{what} has no label: expected {key}.cls, or {key}.json with a number named label or cls"
                )
            numbers.append(
                _label(os.pread(file.fileno(), beside.size, beside.offset), beside.name, what, job.num_classes)
            )
            try:
                shapes.append(header_size(_open(tar, member)))
            except ValueError as error:
                raise ValueError(f"{what} cannot be read ({error}); make the shard anew") from None
    return ImageList(
        folder=job.folder,
        names=np.array([os.fsencode(f"{job.shard}/{member.name}") for member in images.values()], np.bytes_),
        labels=np.array(numbers, np.int64),
        heights=np.array([height for height, _ in shapes], np.int32),
        widths=np.array([width for _, width in shapes], np.int32),
        sizes=np.array([member.size for member in images.values()], np.int64),
        offsets=np.array([member.offset for member in images.values()], np.int64),
    )


def _samples(path: Path, members: Sequence[Member]) -> tuple[dict[str, Member], dict[str, Member]]:
    """The images and the labels of a shard by their keys: the path up to the first dot of the file's name."""
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    for member in members:
        place = PurePosixPath(member.name)
        stem, _, suffix = place.name.partition(".")
        key, suffix = str(place.with_name(stem)) if stem else "", suffix.lower()
        if not stem:
            continue
        if f".{suffix}" in IMAGE_SUFFIXES:
            if key in images:
                raise ValueError(f"the shard {path} has two images {key}.*: {images[key].name} and {member.name}")
            images[key] = member
        elif suffix == "cls" or (suffix == "json" and key not in labels):
            labels[key] = member
    if not images:
        raise ValueError(f"the shard {path} has no image in it (expected {', '.join(IMAGE_SUFFIXES)})")
    return images, labels


def _label(content: bytes, name: str, what: str, num_classes: int) -> int:
    try:
        if name.lower().endswith(".cls"):
            label = int(content)
        else:
            facts = json.loads(content)
            label = facts["label"] if "label" in facts else facts["cls"]
            if type(label) is not int:
                raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{what} has no label: {name} is {content[:40]!r}; expected a number, in .json one named label or cls"
        ) from None
    if not 0 <= label < num_classes:
        raise ValueError(f"{what} has the label {label}; expected 0 to {num_classes - 1}, one for each class")
    return label


def _open(tar: tarfile.TarFile, member: Member) -> IO[bytes]:
    """The member as a file: a header is read without the rest."""
    info = tarfile.TarInfo(member.name)
    info.offset_data, info.size = member.offset, member.size
    file = tar.extractfile(info)
    assert file is not None  # it is a regular one
    return file
