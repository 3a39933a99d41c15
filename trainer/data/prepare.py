"""Make a data set ready for training: `bitfleet data prepare SOURCE DEST`."""

import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitfleet.trainer.data import cifar, imagenet, kaggle
from bitfleet.trainer.data.archives import LAYOUT as ARCHIVES
from bitfleet.trainer.data.layouts import Source, recognise
from bitfleet.trainer.data.manifest import FILE, QUARANTINE, SPLITS, Manifest, read_facts, write_manifest
from bitfleet.trainer.data.unfinished import only_one, unfinished_folder

_LOCK = ".prepare.lock"


def prepare(source: Path, dest: Path, *, num_workers: int, allow_incomplete: bool = False) -> str:
    """Bring the data set in `source` into a form that `open_dataset` reads, and write its manifest.

    Archives are extracted into DEST.unfinished, which becomes `dest` when everything is there and checked; an interrupted run
    is continued by the next. Class folders, Kaggle's form and WebDataset shards stay where they are: `dest`, which may be
    `source`, gets the manifest.

    Args:
        source: a folder in one of the forms of layouts.py, or CIFAR-10's archive.
        dest: the prepared data set: new, empty, prepared from the same source, or `source`.
        num_workers: processes.
        allow_incomplete: go on with a number of images that is not the expected one; the manifest and the result say so.

    Returns:
        What was done, for the terminal.

    Raises:
        ValueError: the form of `source` is not clear, it is damaged or incomplete, `dest` has something else in it, the
            disk is full, or another prepare is at work on `dest`.
    """
    source, dest = (Path(os.path.abspath(path.expanduser())) for path in (source, dest))
    form = recognise(source)
    try:
        if not form.extracted:
            with only_one(dest / _LOCK, dest):
                _check_dest(source, dest, form)
                manifest, seconds = _make(form, source, dest, num_workers, allow_incomplete)
            return _summary_of_new(dest, manifest, seconds, "listed, where they lie,")
        if facts := _check_dest(source, dest, form):
            return _summary(dest, facts, f"{dest} is prepared already; nothing was done")
        with unfinished_folder(dest, _plan(form)) as folder:
            manifest, seconds = _make(form, source, folder, num_workers, allow_incomplete)
        return _summary_of_new(dest, manifest, seconds, "extracted")
    except OSError as error:  # a full disk above all
        place = f" ({error.filename})" if error.filename else ""
        raise ValueError(
            f"bitfleet data prepare {source} {dest} stopped: {error.strerror or error}{place}; mend it and give the same command "
            "again, it continues"
        ) from None


def _make(form: Source, source: Path, folder: Path, num_workers: int, allow_incomplete: bool) -> tuple[Manifest, float]:
    """List or extract the images, check them, write the manifest into `folder`; returns it and the seconds that it took."""
    start = time.monotonic()
    manifest = form.make(num_workers=num_workers, **({"into": folder} if form.extracted else {}))
    facts: dict[str, Any] = {"source": str(source)}
    if incomplete := _check(manifest, source):
        if not allow_incomplete:
            raise ValueError(f"{'; '.join(incomplete)}. Complete it, or prepare what is there with --allow_incomplete")
        facts["incomplete"] = incomplete
    write_manifest(replace(manifest, facts=facts), folder)
    return manifest, time.monotonic() - start


def _plan(form: Source) -> dict[str, Any]:
    return {"layout": form.layout, "archives": {archive.name: archive.stat().st_size for archive in form.extracted}}


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
        *(f"INCOMPLETE: {fault}" for fault in facts.get("incomplete", [])),
        f"next      bitfleet data verify {shlex.quote(str(dest))}",
    ]
    return "\n".join(lines)
