"""WebDataset shards, indexed where they lie: the images are read from within the archives."""

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.compressed_shards import unpack
from bitfleet.launch.data.listing import Listing
from bitfleet.launch.data.shard_samples import samples
from bitfleet.launch.data.tar_members import Member, list_members
from bitfleet.launch.data.unfinished import write_whole
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.image_kinds import HEAD_BYTES
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.index import header_size
from bitfleet.trainer.data.left_out import LeftOut
from bitfleet.trainer.data.manifest import Manifest, concatenate
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shard:
    """What a shard holds."""

    images: ImageList | None
    """None if it cannot be read."""
    omitted: LeftOut
    unreadable: dict[str, str]
    """Name of an image -> why its header cannot be read."""
    damage: str
    """Why the shard cannot be read, or ""."""


def index(
    folder: Path, train: Sequence[str], val: Sequence[str], *, num_workers: int, beside: LeftOut | None = None
) -> Listing:
    """List the images of shards in the order of the shards, and within each in its own order.

    A sample is KEY.jpg (or another suffix of an image) with KEY.cls, the label as text, or KEY.json with "label" or "cls".
    Names of the classes: a line each in classes.txt beside the shards, else ImageNet's for labels 0 .. 999, else the numbers.

    Args:
        folder: what the paths are relative to.
        train: shards of the training images.
        val: shards of the validation images.
        num_workers: processes.
        beside: what lies in `folder` and is none of the shards.

    Raises:
        ValueError: shards are damaged, all of which are named, or no image has a label that a class has.
    """
    named = _read_classes(folder / CLASSES_FILE)
    lists: dict[str, list[ImageList]] = {}
    omitted: dict[str, LeftOut] = {}
    unreadable: dict[str, str] = {}
    damages: list[str] = []
    for split, shards, title in (
        ("train", train, "training images (estimated)"),
        ("val", val, "validation images (estimated)"),
    ):
        jobs = [
            _Job(folder=folder, shard=shard, num_classes=len(named) if named else _MOST_CLASSES) for shard in shards
        ]
        weights = [_SHARD_IMAGES] * len(jobs)
        found = run_jobs(_index_shard, jobs, weights, num_workers=num_workers, title=title)
        damages += [shard.damage for shard in found if shard.damage]
        omitted[split] = LeftOut()
        for shard in found:
            omitted[split].update(shard.omitted)
            unreadable |= shard.unreadable
        lists[split] = [shard.images for shard in found if shard.images is not None]
    if damages:
        raise ValueError("; ".join(damages))
    train_list, val_list = concatenate(lists["train"]), concatenate(lists["val"])
    for split, images in (("train", train_list), ("val", val_list)):
        if not len(images):
            why = omitted[split].fault(0)
            raise ValueError(f"the shards of {split} in {folder} have no image with a label{f': {why}' if why else ''}")
    if named:
        classes = named
    else:
        _check_range(train_list, val_list)
        classes = tuple(map(str, range(int(train_list.labels.max()) + 1)))
        if len(classes) == len(imagenet.synsets()):
            classes = imagenet.synsets()
    return Listing(
        manifest=Manifest(train=train_list, val=val_list, classes=classes, layout=LAYOUT),
        omitted=omitted | ({"root": beside} if beside else {}),
        unreadable=unreadable,
    )


def unpack_and_index(
    folder: Path,
    train: Sequence[str],
    val: Sequence[str],
    *,
    into: Path,
    num_workers: int,
    beside: LeftOut | None = None,
) -> Listing:
    """As `index`, of shards that are compressed: they are written into `into` first.

    Raises:
        ValueError: as `index`.
    """
    names = unpack(folder, [*train, *val], into, num_workers=num_workers)
    if (folder / CLASSES_FILE).exists():
        write_whole(into / CLASSES_FILE, (folder / CLASSES_FILE).read_bytes())
    return index(into, names[: len(train)], names[len(train) :], num_workers=num_workers, beside=beside)


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


def _index_shard(job: _Job) -> _Shard:
    path, omitted = job.folder / job.shard, LeftOut()
    try:
        members = list_members(path, omitted)
    except (ValueError, OSError) as error:
        return _Shard(images=None, omitted=omitted, unreadable={}, damage=str(error))
    listed: list[tuple[Member, int, tuple[int, int]]] = []
    unreadable = {}
    with open(path, "rb") as file, tarfile.open(path, "r:") as tar:

        def content(member: Member) -> bytes:
            return os.pread(file.fileno(), member.size, member.offset)

        def head(member: Member) -> bytes:
            return content(member._replace(size=min(member.size, HEAD_BYTES)))

        for sample in samples(members, f"the shard {path}", omitted, head):
            what = f"the image {sample.image.name} in the shard {path}"
            if sample.label is None:
                omitted.add(left_out.NO_LABEL, f"{what} has no label: expected {sample.expected}")
                continue
            label = _label(content(sample.label), sample.label.name)
            if isinstance(label, str):
                omitted.add(left_out.NO_LABEL, f"{what} has no label: {label}")
            elif not 0 <= label < job.num_classes:
                fault = f"{what} has the label {label}; expected 0 to {job.num_classes - 1}, one for each class"
                omitted.add(left_out.NO_CLASS, fault)
            else:
                shape = (0, 0)
                try:
                    shape = header_size(_open(tar, sample.image))
                except ValueError as error:
                    unreadable[f"{job.shard}/{sample.image.name}"] = str(error)
                listed.append((sample.image, label, shape))
    if not listed and not omitted.counts:
        omitted.add(left_out.EMPTY_SHARD, f"the shard {path}")
    return _Shard(images=_image_list(job, listed), omitted=omitted, unreadable=unreadable, damage="")


def _image_list(job: _Job, listed: Sequence[tuple[Member, int, tuple[int, int]]]) -> ImageList:
    members = [member for member, _, _ in listed]
    shapes = np.array([shape for _, _, shape in listed], np.int32).reshape(-1, 2)
    return ImageList(
        folder=job.folder,
        names=np.array([os.fsencode(f"{job.shard}/{member.name}") for member in members], np.bytes_),
        labels=np.array([label for _, label, _ in listed], np.int64),
        heights=shapes[:, 0].copy(),
        widths=shapes[:, 1].copy(),
        sizes=np.array([member.size for member in members], np.int64),
        offsets=np.array([member.offset for member in members], np.int64),
    )


def _label(content: bytes, name: str) -> int | str:
    """The label, or what is wrong with it."""
    try:
        if name.lower().endswith(".cls"):
            return int(content)
        facts = json.loads(content)
        label = facts["label"] if "label" in facts else facts["cls"]
        if type(label) is not int:
            raise ValueError
        return label
    except (ValueError, KeyError, TypeError):
        return f"{name} is {content[:40]!r}; expected a number, in .json one named label or cls"


def _open(tar: tarfile.TarFile, member: Member) -> IO[bytes]:
    """The member as a file: a header is read without the rest."""
    info = tarfile.TarInfo(member.name)
    info.offset_data, info.size = member.offset, member.size
    file = tar.extractfile(info)
    assert file is not None  # it is a regular one
    return file
