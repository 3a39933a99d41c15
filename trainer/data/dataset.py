"""A data set as the trainer sees it: two lists of images and the names of their classes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from bitfleet.trainer.data import manifest
from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.fashion import FULL_ROOT, SUBSET_ROOT, fashion_mnist_root
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.index import load_image_list, scan_root
from bitfleet.trainer.data.stall import call_within


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """The images of a data set, listed, not read."""

    train: ImageList
    """Training images."""
    val: ImageList
    """Validation images."""
    classes: tuple[str, ...]
    """Names of the classes; the position is the label."""
    sha: str
    """sha256 of both lists: two data sets of one sha give the same stream."""
    num_quarantined: int = 0
    """Images that `bitfleet data verify` set aside, which are in neither list."""

    def summary(self) -> str:
        """The size of the data set, in words."""
        text = (
            f"{len(self.train):,} training and {len(self.val):,} validation images of {len(self.classes):,} classes in "
            f"{self.train.folder}"
        )
        if self.num_quarantined:
            text += f"; {self.num_quarantined:,} that bitfleet data verify set aside are LEFT OUT"
        return text


def open_dataset(config: DataConfig) -> Dataset:
    """List the images of `config.root`.

    A folder that `bitfleet data prepare` made has a manifest, which is read. In any other folder the class folders are listed
    and, the first time, image headers are read. Embedded data is unpacked the first time.

    Raises:
        ValueError: The root is missing or neither prepared nor in class folders, its images are not there or all quarantined,
            the header of an image cannot be read, or the disk does not answer.
    """
    if config.root in (SUBSET_ROOT, FULL_ROOT):
        root = fashion_mnist_root(config.root)
    else:
        root = Path(config.root).expanduser().absolute()
    if call_within((root / manifest.FILE).exists, config.stall_seconds, root):
        return _open_prepared(root, config.stall_seconds)
    train_found, val_found = scan_root(root)
    train, val = load_image_list(train_found), load_image_list(val_found)
    return Dataset(train=train, val=val, classes=train_found.classes, sha=manifest.lists_sha(train, val))


def _open_prepared(root: Path, stall_seconds: float) -> Dataset:
    prepared, sha = call_within(lambda: manifest.read_manifest(root), stall_seconds, root / manifest.FILE)
    if quarantined := manifest.read_quarantine(root):
        sha = hashlib.sha256("\n".join([sha, *sorted(quarantined)]).encode(errors="surrogateescape")).hexdigest()
    train, val = manifest.without(prepared.train, quarantined), manifest.without(prepared.val, quarantined)
    if not call_within(train.folder.is_dir, stall_seconds, train.folder):  # it may be on another disk than the manifest
        raise ValueError(
            f"the images of {root} lie in {train.folder}, which is not there: mount it, or, if they were moved, run bitfleet "
            "data prepare again"
        )
    for split, images in (("training", train), ("validation", val)):
        if not len(images):
            raise ValueError(
                f"{root} has no {split} image left: bitfleet data verify set all of them aside (the reasons are in "
                f"{root / manifest.QUARANTINE}); put whole files in their place and run verify again"
            )
    num_quarantined = len(prepared.train) + len(prepared.val) - len(train) - len(val)
    return Dataset(train=train, val=val, classes=prepared.classes, sha=sha, num_quarantined=num_quarantined)
