"""Make a data set ready for training: `bitfleet data prepare SOURCE DEST`."""

import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bitfleet.launch.data import cifar, imagenet, kaggle
from bitfleet.launch.data.archives import LAYOUT as ARCHIVES
from bitfleet.launch.data.layouts import Source, recognise
from bitfleet.launch.data.listing import Listing
from bitfleet.launch.data.unfinished import only_one, unfinished_folder
from bitfleet.trainer.data.class_names import look_alikes, shown
from bitfleet.trainer.data.index import NUM_REASONS, unreadable_images
from bitfleet.trainer.data.left_out import in_words
from bitfleet.trainer.data.manifest import (
    FILE,
    QUARANTINE,
    SPLITS,
    Manifest,
    read_facts,
    read_quarantine,
    write_manifest,
    write_quarantine,
)

_LOCK = ".prepare.lock"


class _Policy(NamedTuple):
    """What is not an error."""

    allow_incomplete: bool
    quarantine: bool


def prepare(
    source: Path,
    dest: Path,
    *,
    num_workers: int,
    allow_incomplete: bool = False,
    quarantine: bool = False,
) -> str:
    """Bring the data set in `source` into a form that `open_dataset` reads, and write its manifest.

    Archives are extracted into DEST.unfinished, which becomes `dest` when everything is there and checked; an interrupted run
    is continued by the next. Class folders, Kaggle's form and WebDataset shards stay where they are: `dest`, which may be
    `source`, gets the manifest.

    Args:
        source: a folder in one of the forms of layouts.py, or CIFAR-10's archive.
        dest: the prepared data set: new, empty, prepared from the same source, or `source`.
        num_workers: processes.
        allow_incomplete: go on with a number of images that is not the expected one, with classes that have none in
            validation, or where more than a trace is left out; the manifest and the result say so.
        quarantine: list images whose headers cannot be read in DEST/quarantine.tsv, as `bitfleet data verify` lists what does
            not decode, and leave them where they are. False: they are an error that names all of them.

    Returns:
        What was done, for the terminal.

    Raises:
        ValueError: the form of `source` is not clear, it is damaged or incomplete, `dest` has something else in it, the
            disk is full, or another prepare is at work on `dest`.
    """
    source, dest = (Path(os.path.abspath(path.expanduser())) for path in (source, dest))
    form = recognise(source)
    policy = _Policy(allow_incomplete, quarantine)
    try:
        if not form.extracted:
            with only_one(dest / _LOCK, dest):
                _check_dest(source, dest, form)
                manifest, seconds = _make(form, source, dest, num_workers, policy)
            return _summary_of_new(dest, manifest, seconds, "listed, where they lie,")
        if facts := _check_dest(source, dest, form):
            return _summary(dest, facts, f"{dest} is prepared already; nothing was done")
        with unfinished_folder(dest, _plan(form)) as folder:
            manifest, seconds = _make(form, source, folder, num_workers, policy)
        return _summary_of_new(dest, manifest, seconds, "extracted")
    except OSError as error:  # a full disk above all
        place = f" ({error.filename})" if error.filename else ""
        raise ValueError(
            f"bitfleet data prepare {source} {dest} stopped: {error.strerror or error}{place}; mend it and give the same command "
            "again, it continues"
        ) from None


def _make(form: Source, source: Path, folder: Path, num_workers: int, policy: _Policy) -> tuple[Manifest, float]:
    """List or extract the images, check them, write the manifest into `folder`; returns it and the seconds that it took."""
    start = time.monotonic()
    listing = form.make(num_workers=num_workers, **({"into": folder} if form.extracted else {}))
    manifest = listing.manifest
    facts: dict[str, Any] = {"source": str(source)}
    if incomplete := [*listing.all_faults(source), *_check(manifest, source)]:
        facts["incomplete"] = incomplete
    if errors := _errors(listing, incomplete, policy, source, bool(form.extracted)):
        raise ValueError(". ".join(errors))
    if counts := listing.counts():
        facts["left_out"] = counts
    write_manifest(replace(manifest, facts=facts), folder)
    if listing.unreadable:
        write_quarantine(folder, {**read_quarantine(folder), **listing.unreadable})
    return manifest, time.monotonic() - start


def _errors(
    listing: Listing, incomplete: Sequence[str], policy: _Policy, source: Path, is_extracted: bool
) -> list[str]:
    """Everything that keeps a listing from being a data set."""
    errors = []
    if listing.unread:
        errors.append(unreadable_images(listing.unread, "make it readable, or remove it"))
    if listing.unreadable and not policy.quarantine:
        paths = {
            f"{name} from {source}" if is_extracted else f"{listing.manifest.folder}/{name}": reason
            for name, reason in listing.unreadable.items()
        }
        them = "it" if len(paths) == 1 else "them"
        fix = "download the archive again" if is_extracted else f"replace or remove {them}"
        if len(paths) > NUM_REASONS:
            for path, reason in paths.items():
                print(f"unreadable: {shown(path)}: {reason}", file=sys.stderr)
        fix += f", or set {them} aside with --on_bad_sample quarantine"
        errors.append(unreadable_images(paths, fix, ", all named above"))
    if incomplete and not policy.allow_incomplete:
        errors.append(f"{'; '.join(incomplete)}. Complete it, or prepare what is there with --allow_incomplete")
    return errors


def _plan(form: Source) -> dict[str, Any]:
    folder = os.path.commonpath([archive.parent for archive in form.extracted])
    sizes = {os.path.relpath(archive, folder): archive.stat().st_size for archive in form.extracted}
    return {"layout": form.layout, "archives": sizes}


def _check_dest(source: Path, dest: Path, form: Source) -> dict[str, Any] | None:
    """The facts of the manifest that `dest` has from an earlier prepare; None if it has none."""
    if not dest.exists():
        return None
    if not dest.is_dir():
        raise ValueError(f"DEST {dest} is a file; choose a folder")
    in_place = dest.samefile(source)
    if not (dest / FILE).exists():
        own = {FILE, QUARANTINE, _LOCK, *(f"{split}.tsv" for split in SPLITS)}
        foreign = sorted(name for name in os.listdir(dest) if name not in own and not name.startswith(".tmp-"))
        if foreign and not (in_place and not form.extracted):
            raise ValueError(
                f"DEST {dest} has something else in it ({foreign[0]}), and nothing is deleted: choose a new or an empty folder"
            )
        return None
    try:
        facts = read_facts(dest)
    except ValueError:
        raise ValueError(
            f"the manifest {dest / FILE} cannot be read: remove it, and give the same command again"
        ) from None
    if facts["layout"] != form.layout or not (in_place or facts.get("source") == str(source)):
        raise ValueError(
            f"DEST {dest} is prepared from {facts.get('source')} ({facts['layout']}), not from {source} ({form.layout}): choose "
            f"another DEST, or remove {dest / FILE} to have what lies there listed anew"
        )
    return facts


def _check(manifest: Manifest, source: Path) -> list[str]:
    """Compare the data set with what is known of it; returns what is wrong with its numbers of images.

    Raises:
        ValueError: its classes are not those that it should have.
    """
    expected, name = None, ""
    if manifest.layout == cifar.LAYOUT:
        expected, name = imagenet.CIFAR10, "CIFAR-10"
    elif len(manifest.classes) == len(synsets := imagenet.synsets()) and set(manifest.classes) == set(synsets):
        expected, name = imagenet.ILSVRC2012, "ILSVRC2012"
    elif manifest.layout in (ARCHIVES, kaggle.LAYOUT):
        different = sorted(set(manifest.classes) ^ set(synsets))
        raise ValueError(
            f"{source} has {len(manifest.classes):,} classes and not the {len(synsets):,} of ILSVRC2012: {different[0]} is "
            f"{'missing' if different[0] in synsets else 'none of them'}"
        )
    wrong = []
    for split, images in (("training", manifest.train), ("validation", manifest.val)):
        number, least = None, 1
        if expected and split == "training":
            number, least = expected.train, expected.least_train_per_class
        elif expected:
            number, least = expected.val, expected.val_per_class
        counts = np.bincount(images.labels, minlength=len(manifest.classes))
        faults = []
        if number is not None and len(images) != number:
            faults.append(f"{name} has {number:,}")
        if (short := np.flatnonzero(counts < least)).size:
            faults.append(
                f"the class {manifest.classes[short[0]]} has {counts[short[0]]:,}, expected {least:,} or more"
            )
        if faults:
            wrong.append(f"{source} has {len(images):,} {split} images: {'; '.join(faults)}")
    return wrong


def _summary_of_new(dest: Path, manifest: Manifest, seconds: float, done: str) -> str:
    number = len(manifest.train) + len(manifest.val)
    return _summary(dest, read_facts(dest), f"{dest} is prepared: {number:,} images {done} in {seconds:,.0f} s")


def _summary(dest: Path, facts: Mapping[str, Any], first: str) -> str:
    lines = [
        first,
        f"layout    {facts['layout']}",
        f"classes   {len(facts['classes']):,}",
        *(
            f"{split:<9} {facts['images'][split]:,} images, {facts['bytes'][split] / 2**30:,.2f} GiB"
            for split in SPLITS
        ),
        f"sha256    {facts['sha256']}",
        f"manifest  {dest / FILE}",
        *(f"left out  {in_words({split: counts})}" for split, counts in facts.get("left_out", {}).items()),
        *(f"INCOMPLETE: {fault}" for fault in facts.get("incomplete", [])),
        *(f"NOTE: {said}" for said in look_alikes(facts["classes"])),
        *_quarantined(dest),
        f"next      bitfleet data verify {shlex.quote(str(dest))}",
    ]
    return "\n".join(lines)


def _quarantined(dest: Path) -> Iterator[str]:
    if reasons := read_quarantine(dest):
        yield (
            f"SET ASIDE: {len(reasons):,} images, which stay where they are and are left out of training and evaluation: their "
            f"names and the reasons are in {dest / QUARANTINE}"
        )
