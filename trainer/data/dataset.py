"""Open a data set: two lists of images and the names of their classes."""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.fashion import FULL_ROOT, SUBSET_ROOT, fashion_mnist_root
from bitfleet.trainer.data.image_list import (
    FILE,
    QUARANTINE,
    ImageList,
    list_bytes,
    list_scanned,
    read_manifest,
    read_quarantine,
    sha_of,
    unreadable_images,
)
from bitfleet.trainer.data.left_out import in_words, look_alikes
from bitfleet.trainer.data.scan import scan_root
from bitfleet.trainer.data.stall import call_within


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """The images of a data set, listed, not read."""

    train: ImageList
    """Training images."""
    val: ImageList
    """Validation images."""
    classes: tuple[str, ...]
    """Class names by label."""
    sha: str
    """sha256 of both lists: data sets with the same sha give the same stream."""
    num_quarantined: int = 0
    """Images that `bitfleet data verify` or `prepare` set aside, in neither list."""
    notes: tuple[str, ...] = ()
    """Sentences to print at the start: what a scan left out, classes that look the same."""

    def summary(self) -> str:
        """Return the size of the data set and its notes, in words."""
        text = (
            f"{len(self.train):,} training and {len(self.val):,} validation images of {len(self.classes):,} classes in "
            f"{self.train.folder}"
        )
        if self.num_quarantined:
            text += f"; {self.num_quarantined:,} that bitfleet data verify or prepare set aside are LEFT OUT"
        return "; ".join([text, *self.notes])


def check_classes(dataset: Dataset, num_classes: int, root: str) -> None:
    """Raise ValueError unless a network for `num_classes` fits the data set in `root`."""
    if len(dataset.classes) != num_classes:
        raise ValueError(
            f"model.num_classes is {num_classes}, but {root} has {len(dataset.classes)} classes: pass "
            f"--model.num_classes {len(dataset.classes)}"
        )


def open_dataset(config: DataConfig) -> Dataset:
    """List the images of `config.root`.

    A folder from `bitfleet data prepare` has a manifest, which is read. In any other folder the
    class folders are listed and, the first time, image headers are read. Embedded data is unpacked
    the first time.

    Raises:
        ValueError: The root is missing or neither prepared nor in class folders, its images are
            missing or all quarantined, the header of an image cannot be read, or the disk does not
            answer.
    """
    if config.root in (SUBSET_ROOT, FULL_ROOT):
        root = fashion_mnist_root(config.root)
    else:
        root = Path(config.root).expanduser().absolute()
    if call_within((root / FILE).exists, config.stall_seconds, root):
        return _open_prepared(root, config.stall_seconds)
    return _open_class_folders(root, config.allow_incomplete)


def _open_class_folders(root: Path, allow_incomplete: bool) -> Dataset:
    scan = scan_root(root)
    (train, unreadable), (val, unreadable_val) = list_scanned(scan.train), list_scanned(scan.val)
    incomplete = list(scan.faults)
    errors = []
    for scanned in (scan.train, scan.val):
        if fault := scanned.omitted.fault(len(scanned.images)):
            incomplete.append(f"not listed from {scanned.folder}: {fault}")
    if unread := {**scan.unread, **unreadable, **unreadable_val}:
        fix = "replace such files or remove them from the class folders (bitfleet data prepare can set them aside)"
        errors.append(unreadable_images(unread, fix, f" (bitfleet data verify {shlex.quote(str(root))} names all)"))
    if incomplete and not allow_incomplete:
        errors.append(
            f"{'; '.join(incomplete)}. Complete it, or continue with what is there: --data.allow_incomplete True, or "
            "bitfleet data prepare with --allow_incomplete"
        )
    if errors:
        raise ValueError(". ".join(errors))
    counts = {"train": scan.train.omitted.counts, "val": scan.val.omitted.counts, "root": scan.others.counts}
    return Dataset(
        train=train,
        val=val,
        classes=scan.train.classes,
        sha=sha_of([list_bytes(train), list_bytes(val)]),
        notes=_notes(counts, incomplete, scan.train.classes),
    )


def _notes(
    counts: Mapping[str, Mapping[str, int]], incomplete: Sequence[str], classes: Sequence[str]
) -> tuple[str, ...]:
    left_out = [f"not listed: {words}"] if (words := in_words(counts)) else []
    return (*left_out, *(f"INCOMPLETE: {fault}" for fault in incomplete), *look_alikes(classes))


def _open_prepared(root: Path, stall_seconds: float) -> Dataset:
    prepared, sha = call_within(lambda: read_manifest(root), stall_seconds, root / FILE)
    if quarantined := read_quarantine(root):
        sha = hashlib.sha256("\n".join([sha, *sorted(quarantined)]).encode(errors="surrogateescape")).hexdigest()
    train, val = (_readable(images).without(quarantined) for _, images in prepared.splits)
    if not call_within(train.folder.is_dir, stall_seconds, train.folder):  # it may be on another disk than the manifest
        raise ValueError(
            f"the images of {root} lie in {train.folder}, which is not there: mount it, or, if they were moved, run "
            "bitfleet data prepare again"
        )
    for split, images in (("training", train), ("validation", val)):
        if not len(images):
            raise ValueError(
                f"{root} has no {split} image left: bitfleet data verify set all of them aside (the reasons are in "
                f"{root / QUARANTINE}); put whole files in their place and run verify again"
            )
    facts = prepared.facts
    return Dataset(
        train=train,
        val=val,
        classes=prepared.classes,
        sha=sha,
        num_quarantined=len(prepared.train) + len(prepared.val) - len(train) - len(val),
        notes=_notes(facts.get("left_out", {}), facts.get("incomplete", []), prepared.classes),
    )


def _readable(images: ImageList) -> ImageList:
    """Return the images whose header prepare could read; the others have no size."""
    known = images.heights > 0
    return images if known.all() else images.select(known)
