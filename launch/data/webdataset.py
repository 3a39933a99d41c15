"""Layout: WebDataset shards, read where they lie; compressed ones are unpacked first."""

import bz2
import codecs
import functools
import gzip
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.archives import Member, has_class_archives, list_members
from bitfleet.launch.data.source import (
    LAYOUTS,
    TITLES,
    Listing,
    PartialLayout,
    Source,
    concatenate,
    register_layout,
)
from bitfleet.launch.data.unfinished import write_unsynced, written_unsynced
from bitfleet.launch.data.workers import run_jobs
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.decoding import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    header_size,
    is_image,
    is_system_file,
    is_system_folder,
)
from bitfleet.trainer.data.image_list import ImageList, Manifest, build_list
from bitfleet.trainer.data.left_out import LeftOut
from bitfleet.trainer.data.scan import count_others, split_folders

CLASSES_FILE = "classes.txt"

_OPEN: dict[str, Callable[..., Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
    ".tar": open,
}
SHARD_SUFFIXES = tuple(_OPEN)
"""Lower-case suffixes of shards."""
_SPLIT_NAMES = {
    "train": re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE),
    "val": re.compile(r"(?<![a-z])val(id(ation)?)?(?![a-z])", re.IGNORECASE),
}
_CHUNK = 1 << 22  # bytes
_SHARD_IMAGES = 1000  # a guess for the progress bar; only the shard knows
_MOST_CLASSES = 2**31
# As in the webdataset library: the folders and the name up to its first dot, and the extension.
_KEY = re.compile(r"((?:.*/|)[^./][^.]*)[.]([^/]*)", re.DOTALL)
_LABELS = ("cls", "json")  # in the order of preference


@register_layout("WebDataset shards *.tar whose names say train and val, or in train/ and val/")
def detect(source: Path) -> Source | None:
    """Return the shards in `source`, or None."""
    shards: dict[str, list[str]] = {}
    folders = {split: split_folders(source, split) for split in _SPLIT_NAMES}
    for split, name in _SPLIT_NAMES.items():
        flat = [file for file in _tars(source) if name.search(file) and not file.startswith("ILSVRC2012_img_")]
        below = [f"{folder}/{file}" for folder in folders[split] for file in _tars(source / folder)]
        shards[split] = sorted(flat + below, key=os.fsencode)
    if not any(shards.values()):
        return None
    if both := sorted(set(shards["train"]) & set(shards["val"])):
        raise PartialLayout(
            f"the name of the shard {both[0]} says train and val; rename it, or put it into train/ or val/"
        )
    for split, other in (("train", "val"), ("val", "train")):
        if not shards[split]:
            raise PartialLayout(
                f"there are shards of {other} ({shards[other][0]}), and none of {split}: both must be in shards"
            )
    both_splits = (*shards["train"], *shards["val"])
    folder_names = [*folders["train"], *folders["val"]]
    others = count_others(source, {*both_splits, *folder_names})
    for folder in folder_names:
        others.update(count_others(source / folder, _tars(source / folder)))
    is_compressed = any(not shard.lower().endswith(".tar") for shard in both_splits)
    make = unpack_and_list if is_compressed else list_shards
    return Source(
        layout="WebDataset shards",
        make=functools.partial(make, source, shards["train"], shards["val"], others=others),
        extracted=tuple(source / shard for shard in both_splits) if is_compressed else (),
    )


def _tars(folder: Path) -> list[str]:
    if not folder.is_dir() or has_class_archives(folder):
        return []
    of_others = {name for layout in LAYOUTS for name in layout.archives}
    return [
        name
        for name in os.listdir(folder)
        if name.lower().endswith(SHARD_SUFFIXES) and name not in of_others and name[0] != "."
    ]


class _Job(NamedTuple):
    folder: Path
    shard: str
    """Path below `folder`."""
    num_classes: int
    """Labels must be below it."""


class _Shard(NamedTuple):
    """Content of a shard."""

    images: ImageList | None
    """None if the shard cannot be read."""
    omitted: LeftOut
    unreadable: Mapping[str, str] = {}
    """Name of an image -> why its header cannot be read."""
    damage: str = ""
    """Why the shard cannot be read."""


def list_shards(
    folder: Path, train: Sequence[str], val: Sequence[str], *, num_workers: int, others: LeftOut | None = None
) -> Listing:
    """List the images of shards in the order of the shards, and within each in its own order.

    A sample is KEY.jpg (or another image suffix) with KEY.cls, the label as text, or KEY.json with
    "label" or "cls". Class names come from classes.txt next to the shards, one per line, else they
    are ImageNet's for labels 0 .. 999, else the numbers.

    Args:
        folder: Folder that paths are relative to.
        train: Shards of the training images.
        val: Shards of the validation images.
        num_workers: Number of processes.
        others: What lies in `folder` besides the shards.

    Raises:
        ValueError: Shards are damaged, all of which are named, or no image has a label that a class
            has.
    """
    named = _read_classes(folder / CLASSES_FILE)
    num_classes = len(named) if named else _MOST_CLASSES
    lists: dict[str, list[ImageList]] = {}
    omitted: dict[str, LeftOut] = {}
    unreadable: dict[str, str] = {}
    damages: list[str] = []
    for split, shards in (("train", train), ("val", val)):
        jobs = [_Job(folder, shard, num_classes) for shard in shards]
        weights = [_SHARD_IMAGES] * len(jobs)
        title = f"{TITLES[split]} (estimated)"
        results = run_jobs(_list_shard, jobs, weights, num_workers=num_workers, title=title)
        damages += [shard.damage for shard in results if shard.damage]
        omitted[split] = LeftOut()
        for shard in results:
            omitted[split].update(shard.omitted)
            unreadable |= shard.unreadable
        lists[split] = [shard.images for shard in results if shard.images is not None]
    if damages:
        raise ValueError("; ".join(damages))
    joined = {split: concatenate(images) for split, images in lists.items()}
    for split, images in joined.items():
        if not len(images):
            reason = omitted[split].fault(0)
            raise ValueError(
                f"the shards of {split} in {folder} have no image with a label{f': {reason}' if reason else ''}"
            )
    classes = named or _classes_of(joined["train"], joined["val"])
    return Listing(
        manifest=Manifest(train=joined["train"], val=joined["val"], classes=classes, layout="WebDataset shards"),
        omitted=omitted | ({"root": others} if others else {}),
        unreadable=unreadable,
    )


def unpack_and_list(
    folder: Path,
    train: Sequence[str],
    val: Sequence[str],
    *,
    into: Path,
    num_workers: int,
    others: LeftOut | None = None,
) -> Listing:
    """List shards as `list_shards` does after unpacking them into `into`."""
    names = unpack(folder, [*train, *val], into, num_workers=num_workers)
    if (folder / CLASSES_FILE).exists():
        write_unsynced(into / CLASSES_FILE, (folder / CLASSES_FILE).read_bytes())
    return list_shards(into, names[: len(train)], names[len(train) :], num_workers=num_workers, others=others)


def unpack(folder: Path, shards: Sequence[str], into: Path, *, num_workers: int) -> list[str]:
    """Write the missing shards of `folder` uncompressed into `into`; return all new names.

    An image is read by its offset, which a compressed file does not have.

    Raises:
        ValueError: A shard is cut off or damaged; all of them are named.
    """
    names = [shard[: -len(_suffix_of_shard(shard))] + ".tar" for shard in shards]
    if len(set(names)) < len(names):
        twice = [shard for shard, name in zip(shards, names, strict=True) if names.count(name) > 1]
        raise ValueError(f"the shards {' and '.join(twice[:2])} in {folder} are one shard twice: remove one of them")
    jobs = [(folder / shard, into / name) for shard, name in zip(shards, names, strict=True)]
    damages = run_jobs(_unpack, jobs, [1] * len(jobs), num_workers=num_workers, title="shards")
    if any(damages):
        raise ValueError("; ".join(filter(None, damages)))
    return names


def _suffix_of_shard(shard: str) -> str:
    return next(suffix for suffix in SHARD_SUFFIXES if shard.lower().endswith(suffix))


class _DamagedError(Exception):
    """A shard cannot be read; the message says why."""


def _unpack(job: tuple[Path, Path]) -> str:
    """Write a shard; return why it cannot be read, or ""."""
    source, dest = job
    if dest.exists():
        return ""
    try:
        with written_unsynced(dest) as unfinished, open(unfinished, "wb") as file:
            for chunk in _chunks(source):
                file.write(chunk)
    except _DamagedError as error:
        return f"the shard {source} cannot be unpacked ({error}); download it again"
    return ""


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with _OPEN[_suffix_of_shard(path.name)](path, "rb") as packed:
            while chunk := packed.read(_CHUNK):
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _DamagedError(str(error)) from None


def _read_classes(file: Path) -> tuple[str, ...] | None:
    if not file.exists():
        return None
    lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    classes = tuple(os.fsdecode(line.strip()) for line in lines)
    if not classes or not all(classes) or len(set(classes)) != len(classes):
        raise ValueError(f"{file} must name every class once, a line each, in the order of the labels")
    return classes


def _classes_of(train: ImageList, val: ImageList) -> tuple[str, ...]:
    """Return the classes of data without a list of them: those of the training labels."""
    largest = int(train.labels.argmax())
    if train.labels[largest] >= len(train):
        raise ValueError(
            f"the image {train.path(largest)} has the label {train.labels[largest]}, and there are {len(train)} "
            "training images: labels must count the classes from 0"
        )
    if (foreign := ~np.isin(val.labels, train.labels)).any():
        first = int(foreign.argmax())
        raise ValueError(
            f"the image {val.path(first)} has the label {val.labels[first]}, which no training image has: correct the "
            f"label, or name the classes in {CLASSES_FILE} next to the shards, a line each"
        )
    num_classes = int(train.labels[largest]) + 1
    synsets = imagenet.synsets()
    return synsets if num_classes == len(synsets) else tuple(map(str, range(num_classes)))


def _list_shard(job: _Job) -> _Shard:
    path, omitted = job.folder / job.shard, LeftOut()
    try:
        members = list_members(path, omitted)
    except (ValueError, OSError) as error:
        return _Shard(None, omitted, damage=str(error))
    listed: list[tuple[Member, int, tuple[int, int]]] = []
    unreadable = {}
    with open(path, "rb") as file, tarfile.open(path, "r:") as tar:

        def read(member: Member, most_bytes: int | None = None) -> bytes:
            size = member.size if most_bytes is None else min(member.size, most_bytes)
            return os.pread(file.fileno(), size, member.offset)

        for sample in samples(members, f"the shard {path}", omitted, lambda member: read(member, HEAD_BYTES)):
            what = f"the image {sample.image.name} in the shard {path}"
            if sample.label is None:
                omitted.add(left_out.NO_LABEL, f"{what} has no label: expected {sample.expected}")
                continue
            label = _parse_label(read(sample.label), sample.label.name)
            if isinstance(label, str):
                omitted.add(left_out.NO_LABEL, f"{what} has no label: {label}")
            elif not 0 <= label < job.num_classes:
                fault = f"{what} has the label {label}; expected 0 to {job.num_classes - 1}, one for each class"
                omitted.add(left_out.NO_CLASS, fault)
            else:
                shape = (0, 0)
                try:
                    shape = header_size(_opened(tar, sample.image))
                except ValueError as error:
                    unreadable[f"{job.shard}/{sample.image.name}"] = str(error)
                listed.append((sample.image, label, shape))
    if not listed and not omitted.counts:
        omitted.add(left_out.EMPTY_SHARD, f"the shard {path}")
    images = build_list(
        job.folder,
        [f"{job.shard}/{member.name}" for member, _, _ in listed],
        [label for _, label, _ in listed],
        [shape for _, _, shape in listed],
        [member.size for member, _, _ in listed],
        [member.offset for member, _, _ in listed],
    )
    return _Shard(images, omitted, unreadable)


def _parse_label(content: bytes, name: str) -> int | str:
    """Return the label, or what is wrong with it."""
    try:
        if name.lower().endswith(".cls"):
            return int(content)
        entries = json.loads(content)
        label = entries["label"] if "label" in entries else entries["cls"]
        if type(label) is not int:
            raise ValueError
        return label
    except (ValueError, KeyError, TypeError):
        return f"{name} is {content[:40]!r}; expected a number, in .json one named label or cls"


def _opened(tar: tarfile.TarFile, member: Member) -> IO[bytes]:
    """Return the member as a file, of which a header is read without the rest."""
    info = tarfile.TarInfo(member.name)
    info.offset_data, info.size = member.offset, member.size
    file = tar.extractfile(info)
    assert file is not None  # a regular member
    return file


class Sample(NamedTuple):
    """An image and its label."""

    image: Member
    label: Member | None
    expected: str
    """Name that the label should have, for messages."""


def samples(members: Sequence[Member], what: str, omitted: LeftOut, head: Callable[[Member], bytes]) -> list[Sample]:
    """Pair the images of a shard with their labels, in the order of the images.

    KEY.jpg belongs to KEY.cls or KEY.json, whatever dots are in KEY; KEY.image.jpg to KEY.cls if it
    is the only image of KEY.

    Args:
        members: Members of the shard.
        what: Name of the shard, for examples.
        omitted: Counts members that belong to no sample.
        head: Returns the first bytes of a member; called if its suffix says nothing.
    """
    position = {id(member): index for index, member in enumerate(members)}
    pairs: list[Sample] = []
    for key, fields in _by_key(members, what, omitted).items():
        pairs += _samples_of_key(key, fields, what, omitted, head)
    return sorted(pairs, key=lambda sample: position[id(sample.image)])


def _by_key(members: Sequence[Member], what: str, omitted: LeftOut) -> dict[str, dict[str, Member]]:
    """Return key -> extension in lower case -> member."""
    keys: dict[str, dict[str, Member]] = {}
    for member in members:
        *folders, name = member.name.split("/")
        example = f"{member.name} in {what}"
        matched = _KEY.fullmatch(member.name)
        if is_system_file(name) or any(map(is_system_folder, folders)):
            omitted.add(left_out.SYSTEM, example)
        elif name.startswith("."):
            omitted.add(left_out.HIDDEN, example)
        elif name.startswith("__") and name.endswith("__"):  # the library's own notes
            omitted.add(left_out.TEXT, example)
        elif not matched:
            omitted.add(left_out.NO_SUFFIX, example)
        elif (extension := matched[2].lower()) in (fields := keys.setdefault(matched[1], {})):
            omitted.add(left_out.DOUBLE, f"{matched[1]}.*: {fields[extension].name} and {member.name} in {what}")
        else:
            fields[extension] = member
    return keys


def _samples_of_key(
    key: str, fields: Mapping[str, Member], what: str, omitted: LeftOut, head: Callable[[Member], bytes]
) -> list[Sample]:
    images = [extension for extension in fields if _suffix(extension) in IMAGE_SUFFIXES]
    if not images:
        unsure = (extension for extension in fields if _suffix(extension) not in TEXT_SUFFIXES)
        images = [extension for extension in unsure if is_image(head(fields[extension]))]
    if not images:
        _count_without_image(fields, what, omitted)
        return []
    pairs, used = [], set()
    plain = [extension for extension in images if "." not in extension]
    own = [extension for extension in images if extension not in plain and _label(fields, _stem(extension))]
    others = [extension for extension in images if extension not in (*plain, *own)]
    chosen = plain[:1] + own or others[:1]
    for extension in chosen:
        label = _label(fields, _stem(extension)) or _label(fields, "")
        used.add(label)
        expected = f"{key}.cls, or {key}.json with a number named label or cls"
        pairs.append(Sample(fields[extension], fields[label] if label else None, expected))
    doubles = plain[1:] if plain else [] if own else others[1:]
    for extension in images:
        if extension in doubles:
            omitted.add(left_out.DOUBLE, f"{key}.*: {fields[chosen[0]].name} and {fields[extension].name} in {what}")
        elif extension not in chosen:
            omitted.add(left_out.SIDE_IMAGE, f"{fields[extension].name} in {what}")
    for extension in fields:
        if not plain and _suffix(extension) == ".cls" and extension not in used:
            omitted.add(left_out.NO_IMAGE, f"{fields[extension].name} in {what}")
    return pairs


def _count_without_image(fields: Mapping[str, Member], what: str, omitted: LeftOut) -> None:
    labels = [extension for extension in fields if extension.rpartition(".")[2] in _LABELS]
    for extension in labels or list(fields)[:1]:
        example = f"{fields[extension].name} in {what}"
        if labels:
            omitted.add(left_out.NO_IMAGE, example)
        else:
            omitted.add_suffix(_suffix(extension), example)


def _label(fields: Mapping[str, Member], stem: str) -> str | None:
    """Return the extension of the label of the image whose extension is `stem`.jpg."""
    names = (f"{stem}.{kind}" if stem else kind for kind in _LABELS)
    return next((name for name in names if name in fields), None)


def _suffix(extension: str) -> str:
    return "." + extension.rpartition(".")[2]


def _stem(extension: str) -> str:
    return extension.rpartition(".")[0]
