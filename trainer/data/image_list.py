"""Lists of images: where each image lies, its label, and its size in pixels and bytes.

A list comes from the manifest of a prepared data set, or from a scan of class folders, whose image
headers are read once and cached.

A manifest is `manifest.json`, `train.tsv` and `val.tsv` in one folder, next to the images or
elsewhere. A line of a .tsv file is an image: relative path, label, height, width, bytes and, for
images in shards, the byte at which it starts in its shard. Line order is sample order.
manifest.json names the classes, the folder that paths are relative to, and one sha256 over both
lists, checked at every read.
"""

import hashlib
import json
import os
import re
import sys
import zipfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.trainer.data.cache import cache_folder, exclusive
from bitfleet.trainer.data.decoding import header_size
from bitfleet.trainer.data.left_out import shown
from bitfleet.trainer.data.scan import ClassFolders
from bitfleet.trainer.run.files import written_atomically

FILE = "manifest.json"
QUARANTINE = "quarantine.tsv"
SPLITS = ("train", "val")
FORMAT = 1
NUM_REASONS = 20
"""Most images that an error names; it counts the others and says where they are named."""

_SHARD_SUFFIX = re.compile(r"\.tar/", re.IGNORECASE)
_COLUMNS = ("path", "label", "height", "width", "bytes", "offset")
_READER_THREADS = 16  # headers wait for the disk or the network, not for the CPU
_BLOCK_FILES = 256
_SLOW_COUNT = 50_000  # images; from here on reading the headers takes long enough to say so


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageList:
    """The N images of one split in a fixed order; 1.28 M of ImageNet take about 100 MB."""

    folder: Path
    """Folder that names are relative to."""
    names: npt.NDArray[np.bytes_]
    """"train/<class>/<file>" or "<shard>.tar/<member>", file system bytes, NUL-padded [N]."""
    labels: npt.NDArray[np.int64]
    """Class index [N]."""
    heights: npt.NDArray[np.int32]
    """Pixels, as stored in the file (EXIF orientation is not applied) [N]."""
    widths: npt.NDArray[np.int32]
    """Pixels, as stored in the file [N]."""
    sizes: npt.NDArray[np.int64]
    """Bytes of the encoded image [N]."""
    offsets: npt.NDArray[np.int64] | None = None
    """Byte at which the image starts in its shard [N]; None if every image is a separate file."""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the name of image `index` as text."""
        return os.fsdecode(bytes(self.names[index]))

    def path(self, index: int) -> str:
        """Return the absolute path of image `index`; for one in a shard, with the member's name."""
        return f"{self.folder}/{self.name(index)}"

    def read(self, index: int) -> bytes:
        """Return the encoded image `index`.

        Raises:
            OSError: It is missing or cannot be read, or its shard ends within it.
        """
        if self.offsets is None:
            return Path(self.path(index)).read_bytes()
        shard, _ = shard_and_member(self.name(index))
        size = int(self.sizes[index])
        with open(self.folder / shard, "rb") as file:
            encoded = os.pread(file.fileno(), size, int(self.offsets[index]))
        if len(encoded) != size:
            raise OSError(f"the shard {self.folder / shard} ends within the image")
        return encoded

    def select(self, kept: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "ImageList":
        """Return the images at `kept`, a mask or positions."""
        return ImageList(
            folder=self.folder,
            names=self.names[kept],
            labels=self.labels[kept],
            heights=self.heights[kept],
            widths=self.widths[kept],
            sizes=self.sizes[kept],
            offsets=None if self.offsets is None else self.offsets[kept],
        )

    def without(self, names: Collection[str]) -> "ImageList":
        """Return the images whose names are not in `names`."""
        if not names:
            return self
        return self.select(~np.isin(self.names, np.array([os.fsencode(name) for name in names])))


def shard_and_member(name: str) -> tuple[str, str]:
    """Split "train/000001.tar/a.jpg" into the shard "train/000001.tar" and "a.jpg"."""
    suffix = _SHARD_SUFFIX.search(name)  # not in name.lower(), which may be longer
    assert suffix is not None, name
    return name[: suffix.end() - 1], name[suffix.end() :]


def build_list(
    folder: Path,
    names: Sequence[str],
    labels: npt.ArrayLike,
    shapes: npt.ArrayLike,
    sizes: npt.ArrayLike,
    offsets: npt.ArrayLike | None = None,
) -> ImageList:
    """Return an ImageList from columns; `shapes` are heights and widths [N, 2]."""
    heights, widths = np.array(shapes, np.int32).reshape(-1, 2).T
    return ImageList(
        folder=folder,
        names=np.array([os.fsencode(name) for name in names], np.bytes_),
        labels=np.array(labels, np.int64),
        heights=heights.copy(),
        widths=widths.copy(),
        sizes=np.array(sizes, np.int64),
        offsets=None if offsets is None else np.array(offsets, np.int64),
    )


def list_scanned(scanned: ClassFolders) -> tuple[ImageList, dict[str, str]]:
    """Complete a scan with heights and widths from image headers, read once and cached.

    Returns:
        The list, and path -> reason for images whose header cannot be read, listed with 0 x 0
        pixels.
    """
    shapes, reasons = _cached_shapes(scanned)
    names = [f"{scanned.folder.name}/{name}" for name in scanned.names]
    images = build_list(scanned.folder.parent, names, scanned.labels, shapes, scanned.sizes)
    return images, {images.path(index): reason for index, reason in reasons.items()}


def _cached_shapes(scanned: ClassFolders) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
    digest = hashlib.sha256(os.fsencode(os.path.realpath(scanned.folder)) + b"\n")
    digest.update(b"".join(os.fsencode(name) + b"\n" for name in scanned.names))
    mtimes_ns = [image.mtime_ns for image in scanned.images]
    digest.update(np.array([scanned.sizes, mtimes_ns], np.int64).tobytes())
    file = cache_folder() / f"image-sizes-{digest.hexdigest()[:32]}.npz"
    with exclusive(file):  # the other ranks of this machine wait here and then read the file
        if (cached := _read_cache(file, len(scanned.names))) is not None:
            return cached, {}
        shapes, reasons = read_shapes([f"{scanned.folder}/{name}" for name in scanned.names])
        if not reasons:
            with written_atomically(file) as unfinished, unfinished.open("wb") as opened:
                np.savez(opened, heights=shapes[:, 0], widths=shapes[:, 1])
    return shapes, reasons


def _read_cache(file: Path, num_images: int) -> npt.NDArray[np.int32] | None:
    """Return the heights and widths [N, 2] in a cache file; None if it is missing or damaged, as
    after a power failure."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            shapes: npt.NDArray[np.int32] = np.stack([arrays["heights"], arrays["widths"]], axis=1)
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return shapes if shapes.shape == (num_images, 2) else None


def read_shapes(paths: Sequence[str]) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
    """Read heights and widths [N, 2] from image headers with many threads.

    Returns:
        The shapes, and index -> reason for unreadable headers, of 0 x 0 pixels.
    """
    if len(paths) >= _SLOW_COUNT:
        print(f"bitfleet: reading the sizes of {len(paths)} images, once", file=sys.stderr, flush=True)
    Image.init()  # before the threads, which would all load Pillow's plugins at the same time
    shapes, reasons = np.zeros((len(paths), 2), np.int32), {}

    def read_block(start: int) -> None:
        for index in range(start, min(start + _BLOCK_FILES, len(paths))):
            try:
                shapes[index] = header_size(paths[index])
            except ValueError as error:
                reasons[index] = str(error)

    with ThreadPoolExecutor(_READER_THREADS) as pool:
        list(pool.map(read_block, range(0, len(paths), _BLOCK_FILES)))
    return shapes, dict(sorted(reasons.items()))


def unreadable_images(reasons: Mapping[str, str], fix: str, rest: str = "") -> str:
    """Return a sentence about images that cannot be read, naming the first of them.

    Args:
        reasons: Path -> reason; at least one.
        fix: What can be done about it.
        rest: Where the others are named if the sentence does not name all.
    """
    if len(reasons) == 1:
        ((path, reason),) = reasons.items()
        return f"the image {shown(path)} cannot be read ({reason}); {fix}"
    named = "; ".join(f"{shown(path)} ({reason})" for path, reason in islice(reasons.items(), NUM_REASONS))
    more = f"; and {len(reasons) - NUM_REASONS:,} more{rest}" if len(reasons) > NUM_REASONS else ""
    return f"{len(reasons):,} images cannot be read; {fix}: {named}{more}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Manifest:
    """A prepared data set."""

    train: ImageList
    """Training images."""
    val: ImageList
    """Validation images."""
    classes: tuple[str, ...]
    """Class names by label."""
    layout: str
    """Layout that the data came in, e.g. "class folders"."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of manifest.json: source, what was left out, what is incomplete."""

    @property
    def folder(self) -> Path:
        """Folder that the names of both lists are relative to."""
        return self.train.folder

    @property
    def splits(self) -> list[tuple[str, ImageList]]:
        """Name and list of both splits."""
        return list(zip(SPLITS, (self.train, self.val), strict=True))


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Return the manifest in `folder` and the sha256 of its lists, in 1 s per 1.28 M images.

    Raises:
        ValueError: It is missing or unreadable, or its lists have changed since it was written.
    """
    facts = read_facts(folder)
    if sha_of([_read(folder / f"{split}.tsv") for split in SPLITS]) != facts["sha256"]:
        raise ValueError(
            f"the lists train.tsv and val.tsv in {folder} are not those of its {FILE} (their sha256 differs): restore "
            "them, or run bitfleet data prepare again"
        )
    files = folder if facts["files"] == "." else Path(facts["files"])
    train, val = (_parse(folder / f"{split}.tsv", files, facts["longest_path"]) for split in SPLITS)
    num_labels = 1 + max((int(images.labels.max()) for images in (train, val) if len(images)), default=-1)
    if num_labels > len(facts["classes"]):
        raise ValueError(
            f"the manifest {folder / FILE} names {len(facts['classes'])} classes and its lists have {num_labels}: run "
            "bitfleet data prepare again"
        )
    own = {"format", "layout", "files", "images", "bytes", "longest_path", "sha256", "classes"}
    manifest = Manifest(
        train=train,
        val=val,
        classes=tuple(facts["classes"]),
        layout=facts["layout"],
        facts={key: value for key, value in facts.items() if key not in own},
    )
    return manifest, facts["sha256"]


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of manifest.json in `folder`, without reading its lists.

    Raises:
        ValueError: It is missing or unreadable, or has another format.
    """
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{folder} has no {FILE}: make it a data set with `bitfleet data prepare SOURCE DEST` first")
    unreadable = ValueError(f"the manifest {path} cannot be read: run bitfleet data prepare again")
    try:
        facts: dict[str, Any] = json.loads(_read(path))
        if facts["format"] != FORMAT:
            raise ValueError(f"the manifest {path} has format {facts['format']!r}; this bitfleet reads format {FORMAT}")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
        raise unreadable from None
    kinds = {"layout": str, "files": str, "longest_path": int, "sha256": str, "classes": list}
    if not all(isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise unreadable
    return facts


def list_bytes(images: ImageList) -> bytes:
    """Return the text of a list, as in train.tsv.

    Raises:
        ValueError: A path has a tab or a line break in it.
    """
    numbers: list[npt.NDArray[Any]] = [images.labels, images.heights, images.widths, images.sizes]
    if images.offsets is not None:
        numbers.append(images.offsets)
    names = images.names.tolist()
    lines = [b"\t".join(map(os.fsencode, _COLUMNS[: len(numbers) + 1]))]
    rows = zip(*(column.tolist() for column in numbers), strict=True)
    for name, row in zip(names, rows, strict=True):
        lines.append(name + ("\t%d" * len(row) % row).encode())
    text = b"\n".join(lines) + b"\n"
    # numpy, which reads the lists, also ends a line at a carriage return.
    num_lines, num_tabs = len(names) + 1, len(numbers) * (len(names) + 1)
    if (text.count(b"\n"), text.count(b"\t"), text.count(b"\r")) != (num_lines, num_tabs, 0):
        broken = next(name for name in names if set(name) & set(b"\t\n\r"))
        raise ValueError(
            f"the path {images.folder}/{os.fsdecode(broken)!r} has a tab or a line break in it; rename the file"
        )
    return text


def sha_of(lists: Sequence[bytes]) -> str:
    """Return the sha256 of the texts of both lists: equal wherever the same data lies."""
    digest = hashlib.sha256()
    for text in lists:
        digest.update(b"%d\n" % len(text))
        digest.update(text)
    return digest.hexdigest()


def read_quarantine(folder: Path) -> dict[str, str]:
    """Return name -> reason of the images that `bitfleet data verify` or `prepare` set aside.

    Raises:
        ValueError: A line, edited by hand, has no tab.
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
                f"line {number} of {path} is {line!r}: expected a path, a tab and a reason; correct it, or run "
                "bitfleet data verify, which rewrites the list"
            )
        reasons[name] = reason
    return reasons


def _parse(path: Path, folder: Path, longest_path: int) -> ImageList:
    with open(path, "rb") as file:
        columns = file.readline().decode().split()
    kinds = [("path", f"S{longest_path}"), ("label", "i8"), ("height", "i4"), ("width", "i4"), ("bytes", "i8")]
    kinds += [("offset", "i8")] * ("offset" in columns)
    # latin1: a byte of a path is a character of the text, whatever encoding the file system has
    table = np.loadtxt(
        path, dtype=kinds, delimiter="\t", skiprows=1, comments=None, quotechar=None, encoding="latin1", ndmin=1
    )
    arrays = [np.ascontiguousarray(table[name]) for name, _ in kinds]
    names, labels, heights, widths, sizes, *offsets = arrays
    return ImageList(
        folder=folder,
        names=names,
        labels=labels,
        heights=heights,
        widths=widths,
        sizes=sizes,
        offsets=offsets[0] if offsets else None,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"the manifest file {path} cannot be read ({error.strerror}): run bitfleet data prepare again"
        ) from None
