"""A data set as it is found, before a manifest is written: its images, and everything that is wrong with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.index import list_files
from bitfleet.trainer.data.left_out import LeftOut
from bitfleet.trainer.data.manifest import SPLITS, Manifest
from bitfleet.trainer.data.splits import Scan


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Images of a data set, and what is wrong with it."""

    manifest: Manifest
    omitted: Mapping[str, LeftOut] = field(default_factory=dict)
    """By split, and for "root", what is there and not listed."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Images whose headers cannot be read, listed with 0 x 0 pixels: name -> reason."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Folders and shards that cannot be read: path -> reason."""
    faults: tuple[str, ...] = ()
    """What is missing, in words: errors, unless an incomplete data set is allowed."""

    def counts(self) -> dict[str, dict[str, int]]:
        """What is there and not listed: split or "root" -> reason -> number."""
        return {split: dict(omitted.counts) for split, omitted in self.omitted.items() if omitted.counts}

    def all_faults(self, place: Path) -> list[str]:
        """What is missing, and where more than a trace is left out."""
        found = list(self.faults)
        for split, images in zip(SPLITS, (self.manifest.train, self.manifest.val), strict=True):
            if (omitted := self.omitted.get(split)) and (fault := omitted.fault(len(images))):
                found.append(f"not listed from {split} in {place}: {fault}")
        return found


def list_scan(root: Path, scan: Scan, layout: str, *, num_workers: int) -> Listing:
    """Read the headers of the images in class folders of `root`."""
    lists: dict[str, ImageList] = {}
    unreadable: dict[str, str] = {}
    for split, found in (("train", scan.train), ("val", scan.val)):
        lists[split], reasons = list_files(
            root,
            [f"{found.folder.name}/{name}" for name in found.names],
            found.labels,
            found.sizes,
            num_workers=num_workers,
            title="training images" if split == "train" else "validation images",
        )
        unreadable |= reasons
    return Listing(
        manifest=Manifest(train=lists["train"], val=lists["val"], classes=scan.train.classes, layout=layout),
        omitted={"train": scan.train.omitted, "val": scan.val.omitted, "root": scan.beside},
        unreadable=unreadable,
        unread=scan.unread,
        faults=scan.faults,
    )
