"""Describe a data set as it is found, and register the layouts in which it may come.

A layout is one file: it registers a function that recognises the layout in a folder and returns a
Source, whose `make` lists or extracts the images. layouts.py imports the files; docs/extending.md
has an example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bitfleet.launch.data.imagenet import Counts
from bitfleet.launch.data.workers import run_jobs
from bitfleet.trainer.data.image_list import ImageList, Manifest, build_list, read_shapes
from bitfleet.trainer.data.left_out import LeftOut
from bitfleet.trainer.data.scan import ClassFolders

TITLES = {"train": "training images", "val": "validation images"}
"""Titles of progress bars."""
_JOB_FILES = 4096  # headers per job: 256 for each thread


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Images of a data set before its manifest is written, and all their faults."""

    manifest: Manifest
    omitted: Mapping[str, LeftOut] = field(default_factory=dict)
    """Files that are there and not listed, by split and for "root"."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Images whose headers cannot be read, listed with 0 x 0 pixels: name -> reason."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Folders and shards that cannot be read: path -> reason."""
    faults: tuple[str, ...] = ()
    """Sentences about missing parts: errors unless an incomplete data set is allowed."""

    def counts(self) -> dict[str, dict[str, int]]:
        """Return what is there and not listed: split or "root" -> reason -> number."""
        return {split: dict(omitted.counts) for split, omitted in self.omitted.items() if omitted.counts}

    def all_faults(self, source: Path) -> list[str]:
        """Return what is missing, and the splits of which more than a trace is left out."""
        faults = list(self.faults)
        for split, images in self.manifest.splits:
            if (omitted := self.omitted.get(split)) and (fault := omitted.fault(len(images))):
                faults.append(f"not listed from {split} in {source}: {fault}")
        return faults


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set that was recognised in one layout."""

    layout: str
    """Name of the layout."""
    make: Callable[..., Listing]
    """Called with num_workers and, if images are extracted, into: the folder for them."""
    extracted: tuple[Path, ...] = ()
    """Archives or folders that images are extracted from; empty if they are read where they lie."""
    counts: Counts | None = None
    """Published numbers of images that the data set should have."""


class PartialLayout(Exception):
    """A layout is there in part; the message says what is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A registered layout."""

    looks_for: str
    """Files that the layout consists of, for messages."""
    detect: Callable[[Path], Source | None]
    """Returns the data set in a folder or file, or None; may raise PartialLayout."""
    archives: tuple[str, ...] = ()
    """Names of its archives, which are not shards of WebDataset."""


LAYOUTS: list[Layout] = []


def register_layout(
    looks_for: str, archives: tuple[str, ...] = ()
) -> Callable[[Callable[[Path], Source | None]], Callable[[Path], Source | None]]:
    """Register the decorated function as `detect` of a layout; see Layout for the arguments."""

    def register(detect: Callable[[Path], Source | None]) -> Callable[[Path], Source | None]:
        LAYOUTS.append(Layout(looks_for=looks_for, detect=detect, archives=archives))
        return detect

    return register


def list_images(
    folder: Path, split: str, scanned: ClassFolders, *, num_workers: int
) -> tuple[ImageList, dict[str, str]]:
    """Complete a scan of a folder below `folder` with heights and widths; all workers read headers.

    Returns:
        The list, and name -> reason for images whose header cannot be read, listed with 0 x 0
        pixels.
    """
    names = [f"{scanned.folder.name}/{name}" for name in scanned.names]
    jobs = [
        [f"{folder}/{name}" for name in names[start : start + _JOB_FILES]] for start in range(0, len(names), _JOB_FILES)
    ]
    weights = [len(job) for job in jobs]
    results = run_jobs(read_shapes, jobs, weights, num_workers=num_workers, title=TITLES[split])
    shapes = np.concatenate([shapes for shapes, _ in results])
    reasons = {
        names[job * _JOB_FILES + index]: reason
        for job, (_, job_reasons) in enumerate(results)
        for index, reason in job_reasons.items()
    }
    return build_list(folder, names, scanned.labels, shapes, scanned.sizes), reasons


def merge(lists: Sequence[ImageList]) -> ImageList:
    """Return the images of lists with one folder, ordered by label, then by name, bytewise."""
    merged = concatenate(lists)
    return merged.select(np.lexsort((merged.names, merged.labels)))


def concatenate(lists: Sequence[ImageList]) -> ImageList:
    """Return the images of lists with one folder, one list after the other."""
    first = lists[0]
    names, labels, heights, widths, sizes = (
        np.concatenate([getattr(images, column) for images in lists])
        for column in ("names", "labels", "heights", "widths", "sizes")
    )
    offsets = None if first.offsets is None else np.concatenate([images.offsets for images in lists])
    return ImageList(
        folder=first.folder, names=names, labels=labels, heights=heights, widths=widths, sizes=sizes, offsets=offsets
    )
