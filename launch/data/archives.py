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

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.listing import Listing
from bitfleet.launch.data.tar_members import Member, list_members
from bitfleet.launch.data.unfinished import check_space, write_whole, written_before
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.image_kinds import TEXT_SUFFIXES, is_of_system, suffix_of
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.index import header_size
from bitfleet.trainer.data.left_out import LeftOut
from bitfleet.trainer.data.manifest import Manifest, merge
from bitfleet.trainer.data.workers import run_jobs

LAYOUT = "ILSVRC2012 archives"
TRAIN_FILE, VAL_FILE, DEVKIT_FILE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"

_CLASS_ARCHIVE = re.compile(r"n\d{8}\.tar")
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


class _Extracted(NamedTuple):
    """What became of a job."""

    images: ImageList
    omitted: LeftOut
    unreadable: dict[str, str]
    """Name -> why its header cannot be read; it is written all the same."""


def extract(train: Path, val: Path, devkit: Path, *, into: Path, num_workers: int) -> Listing:
    """Extract the archives into `into`/train/<synset>/ and `into`/val/<synset>/, or what is missing there.

    The label is the position of the synset in alphabetical order; the devkit's own ids are in another order.

    Args:
        train: the archive of 1000 archives, or the folder that it was unpacked into.
        val: the flat archive of the validation images, in the order of the devkit's list by the number in their names.
        devkit: the archive that names the synset of every validation image.
        into: DEST.unfinished.
        num_workers: processes.

    Raises:
        ValueError: an archive is damaged or not what it should be, or the disk is too small.
    """
    val_synsets = _read_devkit(devkit, into)
    classes = imagenet.synsets()
    omitted = {"train": LeftOut(), "val": LeftOut()}
    parts = _class_archives(train, classes, omitted["train"])
    val_images = _label_val(val, val_synsets, classes, omitted["val"])
    check_space(into, sum(part.size for _, part in parts) + sum(image.member.size for image in val_images))
    for place in (into / split / name for split in ("train", "val") for name in classes):
        place.mkdir(parents=True, exist_ok=True)
    class_jobs = [
        _ClassJob(archive=archive, part=part, class_name=classes[label], label=label, into=into)
        for label, (archive, part) in enumerate(parts)
    ]
    share = imagenet.ILSVRC2012.train / max(1, sum(part.size for _, part in parts))
    weights = [round(part.size * share) for _, part in parts]  # not known before it is read
    train_parts = run_jobs(_extract_class, class_jobs, weights, num_workers=num_workers, title="training images")
    block_jobs = [
        _BlockJob(archive=val, images=val_images[start : start + _BLOCK_IMAGES], into=into)
        for start in range(0, len(val_images), _BLOCK_IMAGES)
    ]
    weights = [len(job.images) for job in block_jobs]
    val_parts = run_jobs(_extract_block, block_jobs, weights, num_workers=num_workers, title="validation images")
    for split, done in (("train", train_parts), ("val", val_parts)):
        for part in done:
            omitted[split].update(part.omitted)
    lists = [merge([part.images for part in done]) for done in (train_parts, val_parts)]
    return Listing(
        manifest=Manifest(train=lists[0], val=lists[1], classes=classes, layout=LAYOUT),
        omitted=omitted,
        unreadable={name: why for part in (*train_parts, *val_parts) for name, why in part.unreadable.items()},
    )


def is_folder_of_class_archives(folder: Path) -> bool:
    """Whether the archive of the training images was unpacked into `folder`, and the archives in it were not."""
    return folder.is_dir() and any(_CLASS_ARCHIVE.fullmatch(name) for name in os.listdir(folder))


def _class_archives(train: Path, classes: Sequence[str], omitted: LeftOut) -> list[tuple[Path, Member]]:
    """The archive of each class and where in it the class lies, in the order of `classes`."""
    if train.is_dir():
        names = sorted(set(os.listdir(train)) - {TRAIN_FILE, VAL_FILE, DEVKIT_FILE})
        members = [(train / name, Member(name, 0, (train / name).stat().st_size)) for name in names]
    else:
        members = [(train, member) for member in list_members(train, omitted)]
    parts: dict[str, tuple[Path, Member]] = {}
    for archive, member in members:
        name = PurePosixPath(member.name)
        if name.name.startswith("."):
            omitted.add(left_out.SYSTEM, f"{member.name} in {train}")
        elif train.is_dir() and name.suffix != ".tar":
            omitted.add_suffix(name.suffix, f"{member.name} in {train}")
        else:
            parts[name.stem] = (archive, member)
    unknown, missing = sorted(parts.keys() - set(classes)), [name for name in classes if name not in parts]
    if unknown or missing:
        raise ValueError(
            f"the archive {train} has {len(parts):,} classes, {len(missing):,} of the {len(classes):,} of ILSVRC2012 are missing"
            f"{f' (the first: {missing[0]})' if missing else ''} and {len(unknown):,} are none of its"
            f"{f' (the first: {unknown[0]})' if unknown else ''}; use the archive of ILSVRC2012's task 1 and 2"
        )
    return [parts[name] for name in classes]


def _label_val(val: Path, val_synsets: Sequence[str], classes: Sequence[str], omitted: LeftOut) -> list[_Image]:
    """The members of the validation archive: image 00000001 is the first of the devkit's list."""
    label_of = {name: label for label, name in enumerate(classes)}
    images = []
    for member in list_members(val, omitted):
        file = PurePosixPath(member.name).name
        if not _may_be_image(file, f"{member.name} in {val}", omitted):
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


def _extract_class(job: _ClassJob) -> _Extracted:
    what = f"the archive {job.part.name} in {job.archive}"
    omitted, images = LeftOut(), []
    for member in list_members(job.archive, omitted, job.part):
        file = PurePosixPath(member.name).name
        if _may_be_image(file, f"{member.name} in {what}", omitted):
            images.append(_Image(member, f"train/{job.class_name}/{file}", job.label))
    if not images:
        raise ValueError(f"{what} has no image in it; download it again")
    _refuse_doubles(images, what)
    return _extract_block(_BlockJob(archive=job.archive, images=images, into=job.into))._replace(omitted=omitted)


def _may_be_image(file: str, example: str, omitted: LeftOut) -> bool:
    """Whether a member is to be extracted; one that is hidden or a text is counted."""
    if is_of_system(file):
        omitted.add(left_out.SYSTEM, example)
    elif file.startswith("."):
        omitted.add(left_out.HIDDEN, example)
    elif suffix_of(file) in TEXT_SUFFIXES:
        omitted.add(left_out.TEXT, example)
    else:
        return True
    return False


def _refuse_doubles(images: Sequence[_Image], what: str) -> None:
    seen: set[str] = set()
    for image in images:
        if image.name in seen:
            raise ValueError(f"{what} has two members {image.member.name}; download it again")
        seen.add(image.name)


def _extract_block(job: _BlockJob) -> _Extracted:
    shapes, unreadable = [], {}
    with open(job.archive, "rb") as file:
        for image in job.images:
            shape = _extract_image(file.fileno(), image, job.into / image.name)
            if isinstance(shape, str):
                unreadable[image.name], shape = shape, (0, 0)
            shapes.append(shape)
    images = ImageList(
        folder=job.into,
        names=np.array([os.fsencode(image.name) for image in job.images]),
        labels=np.array([image.label for image in job.images], np.int64),
        heights=np.array([height for height, _ in shapes], np.int32),
        widths=np.array([width for _, width in shapes], np.int32),
        sizes=np.array([image.member.size for image in job.images], np.int64),
    )
    return _Extracted(images, LeftOut(), unreadable)


def _extract_image(descriptor: int, image: _Image, path: Path) -> tuple[int, int] | str:
    """Write one image, unless it is there from an earlier run.

    Returns:
        Its height and width in pixels, or why its header cannot be read.
    """
    if (shape := written_before(path, image.member.size)) is not None:
        return shape
    encoded = os.pread(descriptor, image.member.size, image.member.offset)
    write_whole(path, encoded)
    try:
        return header_size(BytesIO(encoded))
    except ValueError as error:
        return str(error)
