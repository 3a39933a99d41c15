"""The three archives of ILSVRC2012, extracted into class folders by all cores."""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from bitfleet.trainer.data import imagenet
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.index import header_size
from bitfleet.trainer.data.manifest import Manifest, merge
from bitfleet.trainer.data.tar_members import Member, list_members
from bitfleet.trainer.data.unfinished import check_space, write_whole, written_before
from bitfleet.trainer.data.workers import run_jobs

LAYOUT = "ILSVRC2012 archives"
TRAIN_FILE, VAL_FILE, DEVKIT_FILE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"

_BLOCK_IMAGES = 256  # of one job of validation images
_DEVKIT_FOLDER = ".devkit"  # within DEST.unfinished, for a moment


class _Image(NamedTuple):
    """What becomes of a member."""

    member: Member
    name: str
    """"train/<class>/<file>", below DEST."""
    label: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _ClassJob:
    """Extract a class of training images, an archive within the archive."""

    archive: Path
    part: Member
    class_name: str
    label: int
    into: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _BlockJob:
    """Extract images of one archive."""

    archive: Path
    images: Sequence[_Image]
    into: Path


def extract(train: Path, val: Path, devkit: Path, *, into: Path, num_workers: int) -> Manifest:
    """Extract the archives into `into`/train/<synset>/ and `into`/val/<synset>/, or what is missing there.

    The label is the position of the synset in alphabetical order; the devkit's own ids are in another order.

    Args:
        train: the archive of 1000 archives.
        val: the flat archive of the validation images, in the order of the devkit's list by the number in their names.
        devkit: the archive that names the synset of every validation image.
        into: DEST.unfinished.
        num_workers: processes.

    Raises:
        ValueError: an archive is damaged or not what it should be, an image is unreadable, or the disk is too small.
    """
    val_synsets = _read_devkit(devkit, into)
    classes = imagenet.synsets()
    parts = _class_archives(train, classes)
    val_images = _label_val(val, val_synsets, classes)
    check_space(into, sum(part.size for part in parts) + sum(image.member.size for image in val_images))
    for place in (into / split / name for split in ("train", "val") for name in classes):
        place.mkdir(parents=True, exist_ok=True)
    class_jobs = [
        _ClassJob(archive=train, part=part, class_name=classes[label], label=label, into=into)
        for label, part in enumerate(parts)
    ]
    share = imagenet.ILSVRC2012.train / max(1, sum(part.size for part in parts))
    weights = [round(part.size * share) for part in parts]  # not known before it is read
    train_lists = run_jobs(_extract_class, class_jobs, weights, num_workers=num_workers, title="training images")
    block_jobs = [
        _BlockJob(archive=val, images=val_images[start : start + _BLOCK_IMAGES], into=into)
        for start in range(0, len(val_images), _BLOCK_IMAGES)
    ]
    weights = [len(job.images) for job in block_jobs]
    val_lists = run_jobs(_extract_block, block_jobs, weights, num_workers=num_workers, title="validation images")
    return Manifest(train=merge(train_lists), val=merge(val_lists), classes=classes, layout=LAYOUT)


def _class_archives(train: Path, classes: Sequence[str]) -> list[Member]:
    """The inner archive of each class, in the order of `classes`."""
    parts = {PurePosixPath(member.name).stem: member for member in list_members(train)}
    parts = {name: part for name, part in parts.items() if not name.startswith(".")}
    unknown, missing = sorted(parts.keys() - set(classes)), [name for name in classes if name not in parts]
    if unknown or missing:
        raise ValueError(
            f"the archive {train} has {len(parts):,} classes, {len(missing):,} of the {len(classes):,} of ILSVRC2012 are missing"
            f"{f' (the first: {missing[0]})' if missing else ''} and {len(unknown):,} are none of its"
            f"{f' (the first: {unknown[0]})' if unknown else ''}; use the archive of ILSVRC2012's task 1 and 2"
        )
    return [parts[name] for name in classes]


def _label_val(val: Path, val_synsets: Sequence[str], classes: Sequence[str]) -> list[_Image]:
    """The members of the validation archive: image 00000001 is the first of the devkit's list."""
    label_of = {name: label for label, name in enumerate(classes)}
    images = []
    for member in list_members(val):
        file = PurePosixPath(member.name).name
        if file.startswith("."):
            continue
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", file)
        if not number or not 1 <= int(number[1]) <= len(val_synsets):
            raise ValueError(
                f"the archive {val} has a member {member.name}; expected ILSVRC2012_val_00000001.JPEG to "
                f"ILSVRC2012_val_{len(val_synsets):08d}.JPEG, which {DEVKIT_FILE} has labels for"
            )
        synset = val_synsets[int(number[1]) - 1]
        images.append(_Image(member, f"val/{synset}/{file}", label_of[synset]))
    if not images:
        raise ValueError(f"the archive {val} has no image in it; download it again")
    _refuse_doubles(images, f"the archive {val}")
    return images


def _read_devkit(devkit: Path, into: Path) -> list[str]:
    """The synset of every validation image, by torchvision, which checks the md5 and writes beside the archive."""
    from torchvision.datasets import imagenet as torchvision_imagenet
    from torchvision.datasets.utils import check_integrity

    place = into / _DEVKIT_FOLDER
    shutil.rmtree(place, ignore_errors=True)  # what a killed process left
    place.mkdir()
    try:
        (place / devkit.name).symlink_to(devkit)
        try:
            torchvision_imagenet.parse_devkit_archive(place, devkit.name)
        except RuntimeError as error:
            if not check_integrity(devkit, torchvision_imagenet.ARCHIVE_META["devkit"][1]):
                raise ValueError(
                    f"the archive {devkit} is incomplete or damaged (its md5 is not that of {DEVKIT_FILE}): download it again"
                ) from None
            # torch's word for a full disk
            raise ValueError(
                f"the labels of {devkit} cannot be written into {place}: {error}; make room there"
            ) from None
        class_names, val_synsets = torchvision_imagenet.load_meta_file(place)
    finally:
        shutil.rmtree(place)
    if tuple(sorted(class_names)) != imagenet.synsets():
        raise ValueError(f"the classes of {devkit} are not those of ILSVRC2012: use {DEVKIT_FILE}")
    return list(val_synsets)


def _extract_class(job: _ClassJob) -> ImageList:
    images = [
        _Image(member, f"train/{job.class_name}/{file}", job.label)
        for member in list_members(job.archive, job.part)
        if not (file := PurePosixPath(member.name).name).startswith(".")
    ]
    what = f"the archive {job.part.name} in {job.archive}"
    if not images:
        raise ValueError(f"{what} has no image in it; download it again")
    _refuse_doubles(images, what)
    return _extract_block(_BlockJob(archive=job.archive, images=images, into=job.into))


def _refuse_doubles(images: Sequence[_Image], what: str) -> None:
    seen: set[str] = set()
    for image in images:
        if image.name in seen:
            raise ValueError(f"{what} has two members {image.member.name}; download it again")
        seen.add(image.name)


def _extract_block(job: _BlockJob) -> ImageList:
    with open(job.archive, "rb") as file:
        shapes = [_extract_image(file.fileno(), job.archive, image, job.into / image.name) for image in job.images]
    return ImageList(
        folder=job.into,
        names=np.array([os.fsencode(image.name) for image in job.images]),
        labels=np.array([image.label for image in job.images], np.int64),
        heights=np.array([height for height, _ in shapes], np.int32),
        widths=np.array([width for _, width in shapes], np.int32),
        sizes=np.array([image.member.size for image in job.images], np.int64),
    )


def _extract_image(descriptor: int, archive: Path, image: _Image, path: Path) -> tuple[int, int]:
    """Write one image, unless it is there from an earlier run; returns its height and width in pixels."""
    if (shape := written_before(path, image.member.size)) is not None:
        return shape
    encoded = os.pread(descriptor, image.member.size, image.member.offset)
    try:
        shape = header_size(BytesIO(encoded))
    except ValueError as error:
        raise ValueError(
            f"the image {image.member.name} in the archive {archive} cannot be read ({error}); download the archive again"
        ) from None
    write_whole(path, encoded)
    return shape
