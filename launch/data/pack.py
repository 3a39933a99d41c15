"""Copy a prepared data set at a smaller size: `bitfleet data pack`.

For machines whose cores cannot decode whole photos in time. The copy is a file per image, or
WebDataset shards: tar files of KEY.jpg and KEY.cls, the label in ASCII.
"""

import io
import os
import re
import shutil
import tarfile
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from itertools import compress, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bitfleet.launch.data.manifest import write_manifest
from bitfleet.launch.data.unfinished import is_started, unfinished_folder, write_unsynced, written_unsynced
from bitfleet.launch.data.workers import run_jobs
from bitfleet.packed.pixels import grey_or_rgb
from bitfleet.trainer.data.decoding import opened
from bitfleet.trainer.data.image_list import (
    ImageList,
    Manifest,
    build_list,
    read_manifest,
    read_quarantine,
    shard_and_member,
)

QUALITY = 90
_JPEG_FORMATS = ("JPEG", "MPO")  # MPO: a JPEG with more pictures behind the first, which alone is read
_JPEG_SUFFIXES = (".jpeg", ".jpg")
_LEAST_SHORT_SIDE = 32
_JOB_IMAGES = 64
_IMAGES_PER_SHARD = 1000
_BYTES_PER_SHARD = 100_000_000

_Split = tuple[ImageList, list[str]]  # images and the names that they get
_Packed = npt.NDArray[np.int64]
"""Height, width, bytes and offset in the shard (0 for a file) of packed images [N, 4]."""


class _Job(NamedTuple):
    """Images to pack: some files, or one shard."""

    images: ImageList
    names: Sequence[str]
    """New names: "<split>/<class>/<file>", or "<shard>.tar/<KEY>.jpg"."""
    folder: Path
    """The unfinished folder, which names are relative to."""
    short_side: int


def pack(root: Path, dest: Path, *, short_side: int = 256, shards: bool = False, num_workers: int) -> str:
    """Write a copy of the prepared data set `root`, resized to `short_side`, into `dest`.

    Labels, order and classes stay; quarantined images are left out. The copy is written into
    DEST.unfinished, which a later call with the same arguments continues, and renamed at the end.

    Args:
        root: Folder with a manifest.
        dest: Folder that does not exist.
        short_side: Pixels. Smaller images keep their size.
        shards: Write WebDataset shards and classes.txt instead of a file per image.
        num_workers: Number of processes.

    Returns:
        A summary for the terminal.

    Raises:
        ValueError: `root` is not prepared, `dest` exists or is being written, an image cannot be
            decoded, the disk is too small or cannot be written, or a worker process died.
    """
    if short_side < _LEAST_SHORT_SIDE:
        raise ValueError(f"short_side={short_side} must be at least {_LEAST_SHORT_SIDE} pixels")
    root, dest = root.expanduser().absolute(), dest.expanduser().absolute()
    source, sha = read_manifest(root)
    quarantined = read_quarantine(root)
    start = time.monotonic()
    plan = {"of": sha, "short_side": short_side, "quality": QUALITY, "shards": shards}
    with unfinished_folder(dest, plan) as folder:
        # Names of all images, so that files and shards stay when an image is quarantined before a
        # restart.
        named = [
            (images, shard_names(images, split, _estimate(images, short_side)))
            if shards
            else (images, file_names(images, split, source.classes))
            for split, images in source.splits
        ]
        kept = [_without(images, names, quarantined) for images, names in named]
        if not is_started(folder):
            _check_space(dest, sum(int(_estimate(images, short_side).sum()) for images, _ in kept))
        _remove_quarantined(folder, named, kept, shards)
        train, val = _run(kept, folder, short_side, shards, num_workers)
        if shards:
            write_unsynced(folder / "classes.txt", os.fsencode("".join(f"{name}\n" for name in source.classes)))
        facts = {**source.facts, "packed": {"short_side": short_side, "quality": QUALITY, "of": sha}}
        write_manifest(
            Manifest(train=train, val=val, classes=source.classes, layout=source.layout, facts=facts), folder
        )
    num_images, num_left_out = len(train) + len(val), len(source.train) + len(source.val) - len(train) - len(val)
    before = sum(int(images.sizes.sum()) for images, _ in kept)
    after = int(train.sizes.sum() + val.sizes.sum())
    return (
        f"{dest}: {num_images:,} images, {before / 1e9:,.3f} GB before, {after / 1e9:,.3f} GB now "
        f"({after / max(before, 1):.0%}), in {time.monotonic() - start:,.0f} s"
        + (f"; {num_left_out:,} quarantined images are left out" if num_left_out else "")
    )


def _without(images: ImageList, names: list[str], quarantined: Collection[str]) -> _Split:
    if not quarantined:
        return images, names
    kept = [images.name(index) not in quarantined for index in range(len(images))]
    return images.select(np.array(kept, np.bool_)), list(compress(names, kept))


def _remove_quarantined(folder: Path, named: Sequence[_Split], kept: Sequence[_Split], shards: bool) -> None:
    """Remove what an earlier start wrote of images that were quarantined since."""

    def files(names: Sequence[str]) -> set[str]:
        return {shard_and_member(name)[0] if shards else name for name in names}

    for (_, all_names), (_, names) in zip(named, kept, strict=True):
        if len(names) < len(all_names):
            for file in files(all_names) - files(names):
                (folder / file).unlink(missing_ok=True)


def _run(
    kept: Sequence[_Split], folder: Path, short_side: int, shards: bool, num_workers: int
) -> tuple[ImageList, ImageList]:
    """Pack both splits; return their lists."""
    cut: Callable[[Sequence[str]], list[int]] = _shard_starts if shards else _file_starts
    jobs = [
        _Job(images.select(np.arange(start, end)), names[start:end], folder, short_side)
        for images, names in kept
        for start, end in pairwise([*cut(names), len(names)])
    ]
    weights = [len(job.names) for job in jobs]
    rows = run_jobs(_pack_shard if shards else _pack_files, jobs, weights, num_workers=num_workers, title="pack")
    packed = np.concatenate([np.zeros((0, 4), np.int64), *rows])
    lists = []
    for (images, names), part in zip(kept, np.split(packed, [len(kept[0][1])]), strict=True):
        offsets = part[:, 3] if shards else None
        lists.append(build_list(folder, names, images.labels, part[:, :2], part[:, 2], offsets))
    return lists[0], lists[1]


def _estimate(images: ImageList, short_side: int) -> npt.NDArray[np.int64]:
    """Return the approximate packed size of each image, bytes [N]."""
    scale = np.minimum(short_side / np.maximum(np.minimum(images.heights, images.widths), 1), 1.0)
    estimate: npt.NDArray[np.int64] = (images.sizes * scale**2).astype(np.int64)
    return estimate


def _check_space(dest: Path, needed: int) -> None:
    free = shutil.disk_usage(dest.parent).free
    if needed / 2 > free:  # the estimate may be too high, but not by half
        raise ValueError(
            f"the copy will take about {needed / 1e9:.1f} GB and the disk of {dest} has {free / 1e9:.1f} GB free: free "
            "some, give a DEST on another disk, or a smaller short side"
        )


def packed_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return the size after torchvision's Resize(short_side); smaller images keep theirs.

    The long side is truncated to whole pixels.
    """
    short = min(height, width)
    if short <= short_side:
        return height, width
    return short_side * height // short, short_side * width // short


def packed_image(encoded: bytes, short_side: int) -> tuple[bytes, int, int]:
    """Return a JPEG whose short side is at most `short_side`, its height and its width.

    A JPEG that is not larger is returned unchanged. Otherwise grey images stay grey and all others
    become RGB, as training decodes them; the resize is bicubic with antialiasing; EXIF is dropped,
    not applied.

    Raises:
        ValueError: It does not decode, or Pillow cannot make a JPEG of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broken EXIF, lost transparency, large images
        try:
            with opened(io.BytesIO(encoded)) as image:
                image.load()
                height, width = packed_size(image.height, image.width, short_side)
                if (width, height) == image.size and image.format in _JPEG_FORMATS:
                    return encoded, height, width
                small = grey_or_rgb(image)
            if (width, height) != small.size:
                small = small.resize((width, height), Image.Resampling.BICUBIC)
            small.info = {}  # comments would be written, too
            jpeg = io.BytesIO()
            small.save(jpeg, "JPEG", quality=QUALITY)
        except Exception as error:  # broken files raise nearly anything in Pillow
            raise ValueError(str(error) or type(error).__name__) from None
    return jpeg.getvalue(), height, width


def _read_packed(job: _Job, index: int) -> tuple[bytes, int, int]:
    """Read and pack image `index` of a job; return its JPEG, height and width.

    Raises:
        ValueError: It cannot be read or decoded.
    """
    try:
        return packed_image(job.images.read(index), job.short_side)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"the image {job.images.path(index)} cannot be packed ({reason}): run bitfleet data verify, which sets "
            "broken images aside, and start the command again, it continues; an image that only Pillow cannot read "
            "must be replaced"
        ) from None


def file_names(images: ImageList, split: str, classes: Sequence[str]) -> list[str]:
    """Return the new file name of each image: its path, or `split`/<class>/<file>, as .JPEG.

    Raises:
        ValueError: Two images would have one name.
    """
    if images.offsets is None:
        wanted = [images.name(index) for index in range(len(images))]
    else:
        wanted = _names_from_shards(images, split, classes)
    taken = {name for name in wanted if name.lower().endswith(_JPEG_SUFFIXES)}
    names = []
    for name in wanted:
        if not name.lower().endswith(_JPEG_SUFFIXES):
            short, long = os.path.splitext(name)[0] + ".JPEG", name + ".JPEG"
            name = long if short in taken else short
            taken.add(name)
        names.append(name)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        first, second = [index for index, name in enumerate(names) if name == twice][:2]
        raise ValueError(
            f"the images {images.path(first)} and {images.path(second)} would both become {twice}: rename one and "
            "prepare again"
        )
    return names


def _names_from_shards(images: ImageList, split: str, classes: Sequence[str]) -> list[str]:
    # A class that cannot be the name of a folder ("tench/fish", ".x") is named by its label.
    folders = [name if re.fullmatch(r"[^./\0\t\n][^/\0\t\n]*", name) else f"class{k}" for k, name in enumerate(classes)]
    names: list[str] = []
    seen: set[str] = set()
    for index, label in enumerate(images.labels.tolist()):
        shard, member = shard_and_member(images.name(index))
        file = os.path.basename(member)
        name = f"{split}/{folders[label]}/{file}"
        if name in seen:  # keys are unique in a shard only
            name = f"{split}/{folders[label]}/{Path(shard).stem}-{file}"
        seen.add(name)
        names.append(name)
    return names


def _file_starts(names: Sequence[str]) -> list[int]:
    return list(range(0, len(names), _JOB_IMAGES))


def _pack_files(job: _Job) -> _Packed:
    """Write the files of a job that are not there yet."""
    rows = []
    for index, name in enumerate(job.names):
        path = job.folder / name
        row = _written_file(path)
        if row is None:
            jpeg, height, width = _read_packed(job, index)
            write_unsynced(path, jpeg)
            row = height, width, len(jpeg), 0
        rows.append(row)
    return np.array(rows, np.int64)


def _written_file(path: Path) -> tuple[int, int, int, int] | None:
    """Return the row of a JPEG; None if it is missing, or damaged by a power failure."""
    try:
        with Image.open(path) as image:
            if image.format not in _JPEG_FORMATS:
                return None
            return image.height, image.width, path.stat().st_size, 0
    except (OSError, SyntaxError, ValueError):
        return None


def shard_names(images: ImageList, split: str, num_bytes: npt.NDArray[np.int64]) -> list[str]:
    """Return a name per image: "<split>/<number of the shard>.tar/<running number>-<stem>.jpg".

    Args:
        images: All images of the split, in order; this list alone decides which shard each goes to.
        split: "train" or "val".
        num_bytes: Approximate packed size of each [N].
    """
    names: list[str] = []
    shard, count, total = 0, 0, 0
    for index, size in enumerate(num_bytes.tolist()):
        if count == _IMAGES_PER_SHARD or (count and total + size > _BYTES_PER_SHARD):
            shard, count, total = shard + 1, 0, 0
        count, total = count + 1, total + size
        stem = os.path.splitext(os.path.basename(images.name(index)))[0].replace(".", "_")  # a dot ends a key
        names.append(f"{split}/{shard:06d}.tar/{index:07d}-{stem}.jpg")
    return names


def _shard_starts(names: Sequence[str]) -> list[int]:
    shards = [shard_and_member(name)[0] for name in names]
    return [index for index, shard in enumerate(shards) if index == 0 or shard != shards[index - 1]]


def _pack_shard(job: _Job) -> _Packed:
    """Write a shard; one that is there already, with the same members, is kept."""
    if (packed := _written_shard(job)) is not None:
        return packed
    labels = job.images.labels.tolist()
    path = job.folder / shard_and_member(job.names[0])[0]
    with written_unsynced(path) as file, tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as shard:
        for index, name in enumerate(job.names):
            jpeg, _, _ = _read_packed(job, index)
            member = shard_and_member(name)[1]
            for member_name, content in ((member, jpeg), (_label_name(member), b"%d" % labels[index])):
                info = tarfile.TarInfo(member_name)  # time 0 and owner 0: the same input gives the same bytes
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    packed = _written_shard(job)
    assert packed is not None
    return packed


def _label_name(member: str) -> str:
    return member.removesuffix("jpg") + "cls"


def _written_shard(job: _Job) -> _Packed | None:
    """Return the rows of a shard; None if it is missing, not whole, or has other members."""
    members = [shard_and_member(name)[1] for name in job.names]
    rows = []
    try:
        with tarfile.open(job.folder / shard_and_member(job.names[0])[0]) as shard:
            infos = shard.getmembers()
            if [info.name for info in infos] != [name for member in members for name in (member, _label_name(member))]:
                return None
            for info in infos[::2]:
                with Image.open(shard.extractfile(info)) as image:  # type: ignore[arg-type]
                    rows.append((image.height, image.width, info.size, info.offset_data))
    except (OSError, tarfile.TarError, SyntaxError, ValueError):
        return None
    return np.array(rows, np.int64)
