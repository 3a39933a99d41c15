"""The manifest of a prepared data set: `manifest.json`, `train.tsv` and `val.tsv` in one folder, beside the images or apart.

A line of a .tsv file is an image: relative path, label, height, width, bytes and, for images in shards, the byte at which it
begins in its shard. Their order is the order of samples. manifest.json names the classes, the folder that the paths are
relative to, and one sha256 over both lists, which is checked whenever they are read.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitfleet.trainer.data.images import ImageList

FILE = "manifest.json"
QUARANTINE = "quarantine.tsv"
SPLITS = ("train", "val")
_FORMAT = 1
_COLUMNS = ("path", "label", "height", "width", "bytes", "offset")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Manifest:
    """A prepared data set."""

    train: ImageList
    """Training images."""
    val: ImageList
    """Validation images."""
    classes: tuple[str, ...]
    """Names of the classes; the position is the label."""
    layout: str
    """The form in which the images came, in words."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of their making; goes into manifest.json."""

    @property
    def folder(self) -> Path:
        """What the names of both lists are relative to."""
        return self.train.folder


def write_manifest(manifest: Manifest, folder: Path) -> str:
    """Write `manifest` into `folder`, manifest.json last; returns the sha256 of its lists.

    Raises:
        ValueError: a path has a tab or a line break in it, or a file cannot be written.
    """
    lists = [list_bytes(manifest.train), list_bytes(manifest.val)]
    sha = _sha(lists)
    for split, text in zip(SPLITS, lists, strict=True):
        write_list(folder / f"{split}.tsv", text)
    inside = manifest.folder.resolve() == folder.resolve()
    facts = {
        "format": _FORMAT,
        "layout": manifest.layout,
        "files": "." if inside else str(manifest.folder.absolute()),
        "images": {"train": len(manifest.train), "val": len(manifest.val)},
        "bytes": {"train": int(manifest.train.sizes.sum()), "val": int(manifest.val.sizes.sum())},
        "longest_path": max(manifest.train.names.itemsize, manifest.val.names.itemsize),
        "sha256": sha,
        **manifest.facts,
        "classes": list(manifest.classes),
    }
    write_list(folder / FILE, (json.dumps(facts, indent=1) + "\n").encode())
    return sha


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Read the manifest in `folder`; returns it and the sha256 of its lists. 1.28 M images take about a second.

    Raises:
        ValueError: it is missing, cannot be read, or its lists are not those that it was written with.
    """
    facts = read_facts(folder)
    lists = [_read(folder / f"{split}.tsv") for split in SPLITS]
    if _sha(lists) != facts["sha256"]:
        raise ValueError(
            f"the lists train.tsv and val.tsv in {folder} are not those of its {FILE} (their sha256 differs): restore them, or "
            "run bitfleet data prepare again"
        )
    files = folder if facts["files"] == "." else Path(facts["files"])
    del lists  # the text of 1.28 M lines; numpy reads the file again, in C
    train, val = (_parse(folder / f"{split}.tsv", files, facts["longest_path"]) for split in SPLITS)
    num_labels = 1 + max((int(images.labels.max()) for images in (train, val) if len(images)), default=-1)
    if num_labels > len(facts["classes"]):
        raise ValueError(
            f"the manifest {folder / FILE} names {len(facts['classes'])} classes and its lists have {num_labels}: run "
            "bitfleet data prepare again"
        )
    known = {"format", "layout", "files", "images", "bytes", "longest_path", "sha256", "classes"}
    manifest = Manifest(
        train=train,
        val=val,
        classes=tuple(facts["classes"]),
        layout=facts["layout"],
        facts={key: value for key, value in facts.items() if key not in known},
    )
    return manifest, facts["sha256"]


def read_facts(folder: Path) -> dict[str, Any]:
    """What manifest.json in `folder` says, its lists unread.

    Raises:
        ValueError: it is missing or cannot be read, or it is of another format.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{folder} has no {FILE}: make it a data set with `bitfleet data prepare SOURCE DEST` first")
    unreadable = ValueError(f"the manifest {path} cannot be read: run bitfleet data prepare again")
    try:
        facts: dict[str, Any] = json.loads(_read(path))
        if (found := facts["format"]) != _FORMAT:
            raise ValueError(f"the manifest {path} has format {found!r}; this bitfleet reads format {_FORMAT}")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        raise unreadable from None
    kinds = {"layout": str, "files": str, "longest_path": int, "sha256": str, "classes": list}
    if not all(isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise unreadable
    return facts


def lists_sha(train: ImageList, val: ImageList) -> str:
    """The sha256 of the two lists as a manifest has them: the same wherever the same data lies."""
    return _sha([list_bytes(train), list_bytes(val)])


def list_bytes(images: ImageList) -> bytes:
    """The text of a list, as in train.tsv.

    Raises:
        ValueError: a path has a tab or a line break in it.
    """
    numbers: list[npt.NDArray[Any]] = [images.labels, images.heights, images.widths, images.sizes]
    if images.offsets is not None:
        numbers.append(images.offsets)
    names = images.names.tolist()
    lines = [b"\t".join(map(os.fsencode, _COLUMNS[: len(numbers) + 1]))]
    columns = zip(*(array.tolist() for array in numbers), strict=True)
    for name, row in zip(names, columns, strict=True):
        lines.append(name + ("\t%d" * len(row) % row).encode())
    text = b"\n".join(lines) + b"\n"
    # numpy, which reads the lists, ends a line at a carriage return, too.
    num_lines, num_tabs = len(names) + 1, len(numbers) * (len(names) + 1)
    if (text.count(b"\n"), text.count(b"\t"), text.count(b"\r")) != (num_lines, num_tabs, 0):
        odd = next(name for name in names if set(name) & set(b"\t\n\r"))
        raise ValueError(
            f"the path {images.folder}/{os.fsdecode(odd)!r} has a tab or a line break in it; rename the file"
        )
    return text


def read_quarantine(folder: Path) -> dict[str, str]:
    """The images that `bitfleet data verify` set aside: name -> reason.

    Raises:
        ValueError: a line has no tab, which somebody wrote by hand.
    """
    path = folder / QUARANTINE
    if not path.exists():
        return {}
    reasons = {}
    lines = os.fsdecode(path.read_bytes()).rstrip("\n").split("\n")  # splitlines knows more breaks than that
    for number, line in enumerate(lines[1:], start=2):
        name, tab, reason = line.partition("\t")
        if not tab:
            raise ValueError(
                f"line {number} of {path} is {line!r}: expected a path, a tab and a reason; correct it, or run bitfleet data "
                "verify, which writes the list anew"
            )
        reasons[name] = reason
    return reasons


def write_quarantine(folder: Path, reasons: Mapping[str, str]) -> None:
    """Set the images of `reasons`, name -> reason, aside; a reader of the data set leaves them out."""
    lines = ["path\treason", *(f"{name}\t{' '.join(reason.split())}" for name, reason in sorted(reasons.items()))]
    write_list(folder / QUARANTINE, os.fsencode("\n".join(lines) + "\n"))


def without(images: ImageList, names: Collection[str]) -> ImageList:
    """The images whose names are not in `names`."""
    if not names:
        return images
    return images.select(~np.isin(images.names, np.array([os.fsencode(name) for name in names])))


def merge(lists: Sequence[ImageList]) -> ImageList:
    """The images of all lists, which have one folder, ordered by label, then by name, bytewise."""
    merged = concatenate(lists)
    return merged.select(np.lexsort((merged.names, merged.labels)))


def concatenate(lists: Sequence[ImageList]) -> ImageList:
    """The images of all lists, which have one folder, one list after the other."""
    names, labels, heights, widths, sizes = (
        np.concatenate([getattr(images, column) for images in lists])
        for column in ("names", "labels", "heights", "widths", "sizes")
    )
    offsets = None if lists[0].offsets is None else np.concatenate([images.offsets for images in lists])
    return ImageList(
        folder=lists[0].folder,
        names=names,
        labels=labels,
        heights=heights,
        widths=widths,
        sizes=sizes,
        offsets=offsets,
    )


def _sha(lists: list[bytes]) -> str:
    digest = hashlib.sha256()
    for text in lists:
        digest.update(b"%d\n" % len(text))
        digest.update(text)
    return digest.hexdigest()


def _parse(path: Path, folder: Path, longest_path: int) -> ImageList:
    with open(path, "rb") as file:
        columns = file.readline().decode().split()
    kinds = [("path", f"S{longest_path}"), ("label", "i8"), ("height", "i4"), ("width", "i4"), ("bytes", "i8")]
    kinds += [("offset", "i8")] * ("offset" in columns)
    # latin1: a byte of a path is a character of the text, whatever encoding the file system has
    table = np.loadtxt(
        path, dtype=kinds, delimiter="\t", skiprows=1, comments=None, quotechar=None, encoding="latin1", ndmin=1
    )
    return ImageList(
        folder=folder,
        names=np.ascontiguousarray(table["path"]),
        labels=np.ascontiguousarray(table["label"]),
        heights=np.ascontiguousarray(table["height"]),
        widths=np.ascontiguousarray(table["width"]),
        sizes=np.ascontiguousarray(table["bytes"]),
        offsets=np.ascontiguousarray(table["offset"]) if "offset" in columns else None,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"the manifest file {path} cannot be read ({error.strerror}): run bitfleet data prepare again"
        ) from None


def write_list(path: Path, text: bytes) -> None:
    """Write a file of a data set: under its name it is whole, also after a power failure.

    Raises:
        ValueError: it cannot be written.
    """
    unfinished = path.with_name(f".tmp-{path.name}")
    try:
        with open(unfinished, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): put that right and give the same command again"
        ) from None
