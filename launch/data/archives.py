"""Layout: the three archives of ILSVRC2012, extracted into class folders by all cores."""

import functools
import os
import posixpath
import re
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.source import TITLES, Listing, PartialLayout, Source, merge, register_layout
from bitfleet.launch.data.unfinished import check_space, shape_if_written, write_unsynced
from bitfleet.launch.data.workers import run_jobs
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.decoding import TEXT_SUFFIXES, header_size, is_system_file, suffix_of
from bitfleet.trainer.data.image_list import ImageList, Manifest, build_list
from bitfleet.trainer.data.left_out import LeftOut
from bitfleet.trainer.data.scan import split_folders

TRAIN_FILE, VAL_FILE, DEVKIT_FILE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_FILES = (TRAIN_FILE, VAL_FILE, DEVKIT_FILE)
_CLASS_ARCHIVE = re.compile(r"n\d{8}\.tar")
_JOB_IMAGES = 256  # validation images per job
_DEVKIT_FOLDER = ".devkit"  # temporary, in DEST.unfinished
_TAR_BLOCK = 512  # bytes of a header, and of the zeros that end an archive


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Byte of the archive's file at which its content starts."""
    size: int
    """Bytes."""


class _Image(NamedTuple):
    """A member that becomes a file."""

    member: Member
    name: str
    """"train/<class>/<file>", below DEST."""
    label: int


class _Job(NamedTuple):
    """Extract images of one archive."""

    archive: Path
    images: Sequence[_Image]
    into: Path


class _ClassJob(NamedTuple):
    """Extract a class of training images, an archive within the archive."""

    archive: Path
    part: Member
    class_name: str
    label: int
    into: Path


class _Extracted(NamedTuple):
    """Result of a job."""

    images: ImageList
    omitted: LeftOut
    unreadable: dict[str, str]
    """Name -> reason for images whose header cannot be read; they are written anyway."""


@register_layout(f"{TRAIN_FILE}, {VAL_FILE} and {DEVKIT_FILE}", archives=_FILES)
def detect(source: Path) -> Source | None:
    """Return the archives in `source`, or None."""
    places = {name: source / name for name in _FILES if (source / name).is_file()}
    if TRAIN_FILE not in places and (unpacked := _class_archive_folder(source)):
        places[TRAIN_FILE] = unpacked
    if not places:
        return None
    present = [name if places[name].is_file() else f"{places[name]}/n*.tar" for name in _FILES if name in places]
    if missing := [name for name in _FILES if name not in places]:
        raise PartialLayout(
            f"of ILSVRC2012's archives there is {', '.join(present)}, and {', '.join(missing)} is missing next to it"
        )
    train, val, devkit = (places[name] for name in _FILES)
    return Source(
        layout="ILSVRC2012 archives",
        make=functools.partial(extract, train, val, devkit),
        extracted=(train, val, devkit),
        counts=imagenet.ILSVRC2012,
    )


def _class_archive_folder(source: Path) -> Path | None:
    """Return the folder that the training archive was unpacked into, with an archive per class."""
    trains = (source / name for name in split_folders(source, "train"))
    places = (source / Path(TRAIN_FILE).stem, *trains, source)
    return next((place for place in places if has_class_archives(place)), None)


def has_class_archives(folder: Path) -> bool:
    """Return True if `folder` is the unpacked training archive, with class archives in it."""
    return folder.is_dir() and any(_CLASS_ARCHIVE.fullmatch(name) for name in os.listdir(folder))


def extract(train: Path, val: Path, devkit: Path, *, into: Path, num_workers: int) -> Listing:
    """Extract the missing images of the archives to `into`/<split>/<synset>/.

    The label is the position of the synset in alphabetical order; the devkit's own ids are in
    another order.

    Args:
        train: Archive of 1000 archives, or the folder that it was unpacked into.
        val: Flat archive of the validation images; the number in a name is its line in the devkit's
            list.
        devkit: Archive that names the synset of every validation image.
        into: DEST.unfinished.
        num_workers: Number of processes.

    Raises:
        ValueError: An archive is damaged or not the expected one, or the disk is too small.
    """
    val_synsets = _read_devkit(devkit, into)
    classes = imagenet.synsets()
    omitted = {"train": LeftOut(), "val": LeftOut()}
    parts = _class_archives(train, classes, omitted["train"])
    val_images = _label_val(val, val_synsets, classes, omitted["val"])
    check_space(into, sum(part.size for _, part in parts) + sum(image.member.size for image in val_images))
    for split in ("train", "val"):
        for name in classes:
            (into / split / name).mkdir(parents=True, exist_ok=True)
    class_jobs = [_ClassJob(archive, part, classes[label], label, into) for label, (archive, part) in enumerate(parts)]
    images_per_byte = imagenet.ILSVRC2012.train / max(1, sum(part.size for _, part in parts))
    weights = [round(part.size * images_per_byte) for _, part in parts]  # the numbers are unknown before reading
    results = {"train": run_jobs(_extract_class, class_jobs, weights, num_workers=num_workers, title=TITLES["train"])}
    starts = range(0, len(val_images), _JOB_IMAGES)
    jobs = [_Job(val, val_images[start : start + _JOB_IMAGES], into) for start in starts]
    weights = [len(job.images) for job in jobs]
    results["val"] = run_jobs(_extract_images, jobs, weights, num_workers=num_workers, title=TITLES["val"])
    unreadable: dict[str, str] = {}
    for split, extracted in results.items():
        for part in extracted:
            omitted[split].update(part.omitted)
            unreadable |= part.unreadable
    lists = {split: merge([part.images for part in extracted]) for split, extracted in results.items()}
    manifest = Manifest(train=lists["train"], val=lists["val"], classes=classes, layout="ILSVRC2012 archives")
    return Listing(manifest=manifest, omitted=omitted, unreadable=unreadable)


def _class_archives(train: Path, classes: Sequence[str], omitted: LeftOut) -> list[tuple[Path, Member]]:
    """Return the archive of each class and its place in it, in the order of `classes`."""
    if train.is_dir():
        names = sorted(set(os.listdir(train)) - set(_FILES))
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
        first_missing = f" (the first: {missing[0]})" if missing else ""
        first_unknown = f" (the first: {unknown[0]})" if unknown else ""
        raise ValueError(
            f"the archive {train} has {len(parts):,} classes, {len(missing):,} of the {len(classes):,} of ILSVRC2012 "
            f"are missing{first_missing} and {len(unknown):,} are not among them{first_unknown}; use the archive of "
            "ILSVRC2012's task 1 and 2"
        )
    return [parts[name] for name in classes]


def _label_val(val: Path, val_synsets: Sequence[str], classes: Sequence[str], omitted: LeftOut) -> list[_Image]:
    """Return the images of the validation archive: 00000001 is the first of the devkit's list."""
    label_of = {name: label for label, name in enumerate(classes)}
    images = []
    for member, file in _image_members(list_members(val, omitted), str(val), omitted):
        number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", file)
        if not number or not 1 <= int(number[1]) <= len(val_synsets):
            raise ValueError(
                f"the archive {val} has a member {member.name}; expected ILSVRC2012_val_00000001.JPEG to "
                f"ILSVRC2012_val_{len(val_synsets):08d}.JPEG, which {DEVKIT_FILE} has labels for"
            )
        synset = val_synsets[int(number[1]) - 1]
        images.append(_Image(member, f"val/{synset}/{file}", label_of[synset]))
    _check_images(images, f"the archive {val}")
    return images


def _read_devkit(devkit: Path, into: Path) -> list[str]:
    """Return the synset of every validation image.

    torchvision checks the md5 and writes next to the archive.
    """
    from torchvision.datasets import imagenet as torchvision_imagenet
    from torchvision.datasets.utils import check_integrity

    folder = into / _DEVKIT_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # from a killed process
    folder.mkdir()
    try:
        (folder / devkit.name).symlink_to(devkit)
        try:
            torchvision_imagenet.parse_devkit_archive(folder, devkit.name)
        except RuntimeError as error:
            if not check_integrity(devkit, torchvision_imagenet.ARCHIVE_META["devkit"][1]):
                raise ValueError(
                    f"the archive {devkit} is incomplete or damaged (its md5 is not that of {DEVKIT_FILE}): download "
                    "it again"
                ) from None
            # torch's message for a full disk
            raise ValueError(
                f"the labels of {devkit} cannot be written into {folder}: {error}; make room there"
            ) from None
        class_names, val_synsets = torchvision_imagenet.load_meta_file(folder)
    finally:
        shutil.rmtree(folder)
    if tuple(sorted(class_names)) != imagenet.synsets():
        raise ValueError(f"the classes of {devkit} are not those of ILSVRC2012: use {DEVKIT_FILE}")
    return list(val_synsets)


def _extract_class(job: _ClassJob) -> _Extracted:
    what = f"the archive {job.part.name} in {job.archive}"
    omitted = LeftOut()
    members = _image_members(list_members(job.archive, omitted, job.part), what, omitted)
    images = [_Image(member, f"train/{job.class_name}/{file}", job.label) for member, file in members]
    _check_images(images, what)
    return _extract_images(_Job(job.archive, images, job.into))._replace(omitted=omitted)


def _image_members(members: Iterable[Member], what: str, omitted: LeftOut) -> list[tuple[Member, str]]:
    """Return the members to extract and their file names; count hidden files and texts."""
    kept = []
    for member in members:
        file, example = PurePosixPath(member.name).name, f"{member.name} in {what}"
        if is_system_file(file):
            omitted.add(left_out.SYSTEM, example)
        elif file.startswith("."):
            omitted.add(left_out.HIDDEN, example)
        elif suffix_of(file) in TEXT_SUFFIXES:
            omitted.add(left_out.TEXT, example)
        else:
            kept.append((member, file))
    return kept


def _check_images(images: Sequence[_Image], what: str) -> None:
    if not images:
        raise ValueError(f"{what} has no image in it; download it again")
    seen: set[str] = set()
    for image in images:
        if image.name in seen:
            raise ValueError(f"{what} has two members {image.member.name}; download it again")
        seen.add(image.name)


def _extract_images(job: _Job) -> _Extracted:
    """Write the images of a job that are not there from an earlier run."""
    shapes, unreadable = [], {}
    with open(job.archive, "rb") as file:
        for member, name, _ in job.images:
            path = job.into / name
            if (shape := shape_if_written(path, member.size)) is None:
                encoded = os.pread(file.fileno(), member.size, member.offset)
                write_unsynced(path, encoded)
                try:
                    shape = header_size(BytesIO(encoded))
                except ValueError as error:
                    unreadable[name], shape = str(error), (0, 0)
            shapes.append(shape)
    names, labels = [image.name for image in job.images], [image.label for image in job.images]
    images = build_list(job.into, names, labels, shapes, [image.member.size for image in job.images])
    return _Extracted(images, LeftOut(), unreadable)


def list_members(path: Path, omitted: LeftOut, part: Member | None = None) -> list[Member]:
    """Return the regular files of an archive in order, and links to them under their own names.

    Only headers are read. tarfile takes a damaged or missing header for the end of the archive, so
    the end is checked here.

    Args:
        path: The file, not compressed.
        omitted: Counts members that are neither files nor folders.
        part: A member that is the archive to be listed; offsets are still those in the outer file.

    Raises:
        ValueError: The archive is cut off or damaged; it is named.
    """
    start, end = (0, path.stat().st_size) if part is None else (part.offset, part.offset + part.size)
    what = f"the archive {path}" if part is None else f"the archive {part.name} in {path}"
    infos: list[tarfile.TarInfo] = []
    last = "its beginning"
    with open(path, "rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if not info.issparse() and (missing := info.offset_data + info.size - end) > 0:
                        raise ValueError(
                            f"{what} is incomplete: {missing:,} of the {info.size:,} bytes of its member {info.name} "
                            "are missing; download it again"
                        )
                    last = f"its member {info.name}"
                    if not info.isdir():
                        infos.append(info)
                after = tar.offset
        except tarfile.TarError as error:
            raise ValueError(f"{what} cannot be read ({error}); download it again") from None
        file.seek(after)
        if after + _TAR_BLOCK > end or any(file.read(_TAR_BLOCK)):
            raise ValueError(
                f"{what} is incomplete or damaged: after {last}, at byte {after - start:,} of {end - start:,}, there "
                "is neither another member nor the mark of its end; download it again"
            )
    return _regular_members(infos, what, omitted)


def _regular_members(infos: list[tarfile.TarInfo], what: str, omitted: LeftOut) -> list[Member]:
    links = {posixpath.normpath(info.name): _link_target(info) for info in infos if info.issym() or info.islnk()}
    files = {posixpath.normpath(info.name): info for info in infos if info.isreg()} if links else {}
    members = []
    for info in infos:
        target = posixpath.normpath(info.name)
        followed = set()
        while not info.isreg() and target in links and target not in followed:
            followed.add(target)
            target = links[target]
        content = info if info.isreg() else files.get(target)
        example = f"{info.name} in {what}"
        if content is None:
            omitted.add(left_out.DANGLING if followed else left_out.IRREGULAR, example)
        elif content.issparse():
            omitted.add(left_out.SPARSE, example)
        else:
            members.append(Member(info.name, content.offset_data, content.size))
    return members


def _link_target(info: tarfile.TarInfo) -> str:
    """Return the name of a link's target in the archive."""
    if info.islnk():
        return posixpath.normpath(info.linkname)
    return posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
