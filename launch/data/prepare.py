"""Make a data set ready for training: `bitfleet data prepare SOURCE DEST`."""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.layouts import recognise
from bitfleet.launch.data.manifest import write_manifest, write_quarantine
from bitfleet.launch.data.source import Listing, Source
from bitfleet.launch.data.unfinished import lock_dest, unfinished_folder
from bitfleet.trainer.data.image_list import (
    FILE,
    NUM_REASONS,
    QUARANTINE,
    SPLITS,
    Manifest,
    read_facts,
    read_quarantine,
    unreadable_images,
)
from bitfleet.trainer.data.left_out import in_words, look_alikes, shown

_LOCK = ".prepare.lock"


def prepare(
    source: Path, dest: Path, *, num_workers: int, allow_incomplete: bool = False, quarantine: bool = False
) -> str:
    """Bring the data set in `source` into a form that `open_dataset` reads, and write its manifest.

    Archives are extracted into DEST.unfinished, which becomes `dest` when everything is there and
    checked; the next call continues an interrupted one. Class folders, Kaggle's form and WebDataset
    shards stay where they are: `dest`, which may be `source`, gets the manifest.

    Args:
        source: Folder in one of the layouts, or CIFAR-10's archive.
        dest: Prepared data set: new, empty, prepared from the same source, or `source`.
        num_workers: Number of processes.
        allow_incomplete: Accept unexpected numbers of images, classes without validation images,
            and more than a trace left out; the manifest and the result say so.
        quarantine: List images whose headers cannot be read in DEST/quarantine.tsv and leave them
            where they are, as `bitfleet data verify` does for images that do not decode. False:
            raise an error that names all of them.

    Returns:
        A summary for the terminal.

    Raises:
        ValueError: The layout of `source` is not clear, it is damaged or incomplete, `dest` has
            something else in it, the disk is full, or another prepare is writing `dest`.
    """
    source, dest = (Path(os.path.abspath(path.expanduser())) for path in (source, dest))
    data = recognise(source)

    def make(folder: Path) -> str:
        start = time.monotonic()
        manifest = _make(data, source, folder, num_workers, allow_incomplete, quarantine)
        action = "extracted" if data.extracted else "listed, where they lie,"
        number, seconds = len(manifest.train) + len(manifest.val), time.monotonic() - start
        return f"{dest} is prepared: {number:,} images {action} in {seconds:,.0f} s"

    try:
        if not data.extracted:
            with lock_dest(dest / _LOCK, dest):
                _check_dest(source, dest, data)
                first_line = make(dest)
        elif _check_dest(source, dest, data):
            first_line = f"{dest} is prepared already; nothing was done"
        else:
            with unfinished_folder(dest, _plan(data)) as folder:
                first_line = make(folder)
    except OSError as error:  # most often a full disk
        file = f" ({error.filename})" if error.filename else ""
        raise ValueError(
            f"bitfleet data prepare {source} {dest} stopped: {error.strerror or error}{file}; fix the cause and rerun "
            "the same command; it resumes"
        ) from None
    return _summary(dest, read_facts(dest), first_line)


def _make(
    data: Source, source: Path, folder: Path, num_workers: int, allow_incomplete: bool, quarantine: bool
) -> Manifest:
    """List or extract the images, check them, and write the manifest into `folder`."""
    listing = data.make(num_workers=num_workers, **({"into": folder} if data.extracted else {}))
    facts: dict[str, Any] = {"source": str(source)}
    if incomplete := [*listing.all_faults(source), *_count_faults(listing.manifest, data, source)]:
        facts["incomplete"] = incomplete
    errors = []
    if listing.unread:
        errors.append(unreadable_images(listing.unread, "make it readable, or remove it"))
    if listing.unreadable and not quarantine:
        errors.append(_unreadable_headers(listing, source, bool(data.extracted)))
    if incomplete and not allow_incomplete:
        errors.append(f"{'; '.join(incomplete)}. Complete it, or prepare what is there with --allow_incomplete")
    if errors:
        raise ValueError(". ".join(errors))
    if counts := listing.counts():
        facts["left_out"] = counts
    write_manifest(replace(listing.manifest, facts=facts), folder)
    if listing.unreadable:
        write_quarantine(folder, {**read_quarantine(folder), **listing.unreadable})
    return listing.manifest


def _unreadable_headers(listing: Listing, source: Path, is_extracted: bool) -> str:
    """Return an error that names the images; print them if they are many."""
    paths = {
        f"{name} from {source}" if is_extracted else f"{listing.manifest.folder}/{name}": reason
        for name, reason in listing.unreadable.items()
    }
    if len(paths) > NUM_REASONS:
        for path, reason in paths.items():
            print(f"unreadable: {shown(path)}: {reason}", file=sys.stderr)
    them = "it" if len(paths) == 1 else "them"
    fix = "download the archive again" if is_extracted else f"replace or remove {them}"
    return unreadable_images(paths, f"{fix}, or set {them} aside with --on_bad_sample quarantine", ", all named above")


def _plan(data: Source) -> dict[str, Any]:
    folder = os.path.commonpath([archive.parent for archive in data.extracted])
    sizes = {os.path.relpath(archive, folder): _num_bytes(archive) for archive in data.extracted}
    return {"layout": data.layout, "archives": sizes}


def _num_bytes(archive: Path) -> int:
    """Return the size of a file, or of the files in a folder, whose own size depends on the file
    system, and on DEST if that is in it."""
    files = [archive] if archive.is_file() else filter(Path.is_file, archive.iterdir())
    return sum(file.stat().st_size for file in files)


def _check_dest(source: Path, dest: Path, data: Source) -> bool:
    """Return True if an earlier prepare of the same data has finished `dest`.

    Raises:
        ValueError: `dest` has something else in it.
    """
    if not dest.exists():
        return False
    if not dest.is_dir():
        raise ValueError(f"DEST {dest} is a file; choose a folder")
    in_place = dest.samefile(source)
    if not (dest / FILE).exists():
        own = {FILE, QUARANTINE, _LOCK, *(f"{split}.tsv" for split in SPLITS)}
        foreign = sorted(name for name in os.listdir(dest) if name not in own and not name.startswith(".tmp-"))
        if foreign and not (in_place and not data.extracted):
            raise ValueError(
                f"DEST {dest} has something else in it ({foreign[0]}), and nothing is deleted: choose a new or an "
                "empty folder"
            )
        return False
    try:
        facts = read_facts(dest)
    except ValueError:
        raise ValueError(f"the manifest {dest / FILE} cannot be read: remove it, and rerun the same command") from None
    if facts["layout"] != data.layout or not (in_place or facts.get("source") == str(source)):
        raise ValueError(
            f"DEST {dest} is prepared from {facts.get('source')} ({facts['layout']}), not from {source} "
            f"({data.layout}): choose another DEST, or remove {dest / FILE} to list what lies there again"
        )
    return True


def _count_faults(manifest: Manifest, data: Source, source: Path) -> list[str]:
    """Return what is wrong with the numbers of images, compared with the published ones if known.

    Raises:
        ValueError: The classes are not those that the layout should have.
    """
    expected = data.counts
    if expected is not imagenet.CIFAR10:
        synsets = imagenet.synsets()
        different = sorted(set(manifest.classes) ^ set(synsets))
        if not different:
            expected = imagenet.ILSVRC2012
        elif expected is imagenet.ILSVRC2012:
            raise ValueError(
                f"{source} has {len(manifest.classes):,} classes and not the {len(synsets):,} of ILSVRC2012: "
                f"{different[0]} is {'missing' if different[0] in synsets else 'not among them'}"
            )
    faults = []
    for split, title in (("train", "training"), ("val", "validation")):
        images = manifest.train if split == "train" else manifest.val
        number, least = None, 1
        if expected and split == "train":
            number, least = expected.train, expected.least_train_per_class
        elif expected:
            number, least = expected.val, expected.val_per_class
        counts = np.bincount(images.labels, minlength=len(manifest.classes))
        wrong = []
        if expected and len(images) != number:
            wrong.append(f"{expected.name} has {number:,}")
        if (short := np.flatnonzero(counts < least)).size:
            wrong.append(f"the class {manifest.classes[short[0]]} has {counts[short[0]]:,}, expected {least:,} or more")
        if wrong:
            faults.append(f"{source} has {len(images):,} {title} images: {'; '.join(wrong)}")
    return faults


def _summary(dest: Path, facts: Mapping[str, Any], first_line: str) -> str:
    lines = [first_line, f"layout    {facts['layout']}", f"classes   {len(facts['classes']):,}"]
    for split in SPLITS:
        lines.append(f"{split:<9} {facts['images'][split]:,} images, {facts['bytes'][split] / 2**30:,.2f} GiB")
    lines += [f"sha256    {facts['sha256']}", f"manifest  {dest / FILE}"]
    lines += [f"left out  {in_words({split: counts})}" for split, counts in facts.get("left_out", {}).items()]
    lines += _remarks(facts.get("incomplete", []), facts["classes"])
    if reasons := read_quarantine(dest):
        lines.append(
            f"SET ASIDE: {len(reasons):,} images, which stay where they are and are left out of training and "
            f"evaluation: their names and the reasons are in {dest / QUARANTINE}"
        )
    return "\n".join([*lines, f"next      bitfleet data verify {shlex.quote(str(dest))}"])


def _remarks(incomplete: Sequence[str], classes: Sequence[str]) -> list[str]:
    return [*(f"INCOMPLETE: {fault}" for fault in incomplete), *(f"NOTE: {note}" for note in look_alikes(classes))]
