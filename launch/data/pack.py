"""`bitfleet data pack`: a smaller copy of a prepared data set, for machines whose cores cannot decode whole photos in time."""

import os
import shutil
import time
from collections.abc import Collection, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bitfleet.launch.data.packed_files import Packed, file_names, files_jobs, pack_files
from bitfleet.launch.data.packed_image import QUALITY
from bitfleet.launch.data.packed_shards import pack_shard, shard_jobs, shard_names
from bitfleet.launch.data.unfinished import is_begun, unfinished_folder, write_whole
from bitfleet.trainer.data.images import ImageList, shard_and_member
from bitfleet.trainer.data.manifest import SPLITS, Manifest, read_manifest, read_quarantine, write_manifest
from bitfleet.trainer.data.workers import run_jobs

_Split = tuple[ImageList, list[str]]  # images and the names of what they become
_LEAST_SHORT_SIDE = 32


def pack(root: Path, dest: Path, *, short_side: int = 256, shards: bool = False, num_workers: int) -> str:
    """Write a copy of the prepared data set `root`, its images resized to `short_side`, as a prepared data set `dest`.

    Labels, order and classes stay; what `bitfleet data verify` set aside is left out. It is written into DEST.unfinished, which
    a later call with the same arguments continues, and renamed at the end.

    Args:
        root: A folder with a manifest.
        dest: A folder that does not exist.
        short_side: Pixels. Images that are not larger keep their size.
        shards: Write WebDataset shards and classes.txt instead of a file an image.
        num_workers: Processes.

    Returns:
        A summary for the terminal.

    Raises:
        ValueError: `root` is not prepared, `dest` exists or is being made, an image cannot be decoded, the disk is too small or
            cannot be written, or a worker process died.
    """
    if short_side < _LEAST_SHORT_SIDE:
        raise ValueError(f"short_side={short_side} must be at least {_LEAST_SHORT_SIDE} pixels")
    root, dest = root.expanduser().absolute(), dest.expanduser().absolute()
    source, sha = read_manifest(root)
    quarantined = read_quarantine(root)
    started = time.monotonic()
    plan = {"of": sha, "short_side": short_side, "quality": QUALITY, "shards": shards}
    with unfinished_folder(dest, plan) as folder:
        whole = [
            (images, _names(images, split, source.classes, short_side, shards)) for split, images in _splits(source)
        ]
        kept = [_without(images, names, quarantined) for images, names in whole]
        if not is_begun(folder):
            _check_space(dest, sum(int(_estimate(images, short_side).sum()) for images, _ in kept))
        _remove_left_out(folder, whole, kept, shards)
        packed = _run(kept, folder, short_side, shards, num_workers)
        train, val = (_packed_list(*split, folder, shards) for split in zip(kept, packed, strict=True))
        if shards:
            write_whole(folder / "classes.txt", os.fsencode("".join(f"{name}\n" for name in source.classes)))
        facts = {**source.facts, "packed": {"short_side": short_side, "quality": QUALITY, "of": sha}}
        made = Manifest(train=train, val=val, classes=source.classes, layout=source.layout, facts=facts)
        write_manifest(made, folder)
    num_left_out = len(source.train) + len(source.val) - len(train) - len(val)
    before = sum(int(images.sizes.sum()) for images, _ in kept)
    return _summary(made, dest, before, num_left_out, time.monotonic() - started)


def _splits(manifest: Manifest) -> list[tuple[str, ImageList]]:
    return list(zip(SPLITS, (manifest.train, manifest.val), strict=True))


def _names(images: ImageList, split: str, classes: Sequence[str], short_side: int, shards: bool) -> list[str]:
    # Of all images, so that names and shards stay when an image is quarantined between a kill and the next start.
    if shards:
        return shard_names(images, split, _estimate(images, short_side))
    return file_names(images, split, classes)


def _without(images: ImageList, names: list[str], quarantined: Collection[str]) -> _Split:
    if not quarantined:
        return images, names
    kept = [images.name(index) not in quarantined for index in range(len(images))]
    return images.select(np.array(kept, np.bool_)), list(compress(names, kept))


def _remove_left_out(folder: Path, whole: Sequence[_Split], kept: Sequence[_Split], shards: bool) -> None:
    """Remove what an earlier start wrote of images that were quarantined since."""
    for (_, all_names), (_, names) in zip(whole, kept, strict=True):
        if len(names) < len(all_names):
            before, now = (
                {shard_and_member(name)[0] if shards else name for name in of_split} for of_split in (all_names, names)
            )
            for file in before - now:
                (folder / file).unlink(missing_ok=True)


def _run(kept: Sequence[_Split], folder: Path, short_side: int, shards: bool, num_workers: int) -> list[Packed]:
    """Pack both splits; returns what came of each."""
    rows: list[Packed]
    if shards:
        in_shards = [job for images, names in kept for job in shard_jobs(images, names, folder, short_side)]
        weights = [len(job.names) for job in in_shards]
        rows = run_jobs(pack_shard, in_shards, weights, num_workers=num_workers, title="pack")
    else:
        in_files = [job for images, names in kept for job in files_jobs(images, names, folder, short_side)]
        weights = [len(job.names) for job in in_files]
        rows = run_jobs(pack_files, in_files, weights, num_workers=num_workers, title="pack")
    return np.split(np.concatenate([np.zeros((0, 4), np.int64), *rows]), [len(kept[0][1])])


def _packed_list(split: _Split, packed: Packed, folder: Path, shards: bool) -> ImageList:
    images, names = split
    heights, widths, sizes, offsets = packed.T
    return ImageList(
        folder=folder,
        names=np.array([os.fsencode(name) for name in names], np.bytes_),
        labels=images.labels,
        heights=heights.astype(np.int32),
        widths=widths.astype(np.int32),
        sizes=sizes.copy(),
        offsets=offsets.copy() if shards else None,
    )


def _estimate(images: ImageList, short_side: int) -> npt.NDArray[np.int64]:
    """About what each image will take, in bytes [N]."""
    scale = np.minimum(short_side / np.maximum(np.minimum(images.heights, images.widths), 1), 1.0)
    estimate: npt.NDArray[np.int64] = (images.sizes * scale**2).astype(np.int64)
    return estimate


def _check_space(dest: Path, needed: int) -> None:
    free = shutil.disk_usage(dest.parent).free
    if needed / 2 > free:  # the estimate may be too high by some, not by half
        raise ValueError(
            f"the copy will take about {needed / 1e9:.1f} GB and the disk of {dest} has {free / 1e9:.1f} GB free: free some, "
            "give a DEST on another disk, or a smaller short side"
        )


def _summary(made: Manifest, dest: Path, before: int, num_left_out: int, seconds: float) -> str:
    num_images = len(made.train) + len(made.val)
    after = int(made.train.sizes.sum() + made.val.sizes.sum())
    text = (
        f"{dest}: {num_images:,} images, {before / 1e9:,.3f} GB before, {after / 1e9:,.3f} GB now "
        f"({after / max(before, 1):.0%}), in {seconds:,.0f} s"
    )
    if num_left_out:
        text += f"; {num_left_out:,} quarantined images are left out"
    return text
