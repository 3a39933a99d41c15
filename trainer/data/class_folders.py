"""One split in class folders: <class>/<image>, images at any depth."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.found_images import (
    BREAK,
    find_images,
    has_break,
    is_folder,
    is_hidden_folder,
    is_image_file,
    way_through,
)
from bitfleet.trainer.data.image_kinds import TEXT_SUFFIXES, is_of_system, suffix_of
from bitfleet.trainer.data.left_out import LeftOut

EXPECTED = (
    "expected ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG, or the DEST of `bitfleet data prepare SOURCE DEST`, which "
    "knows ILSVRC2012's archives, the Kaggle layout, WebDataset shards and CIFAR-10"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassFolders:
    """What a scan of one split found: names, sizes and times, nothing read from the images yet."""

    folder: Path
    classes: tuple[str, ...]
    names: list[str]
    """"<class>/<file>" of each image, or "<class>/<folder>/<file>", and so on."""
    labels: list[int]
    sizes: list[int]
    """Bytes."""
    mtimes_ns: list[int]
    omitted: LeftOut
    """What else lies there."""
    unread: Mapping[str, str]
    """Folders that cannot be read, and images that cannot be listed -> why."""

    @property
    def empty_classes(self) -> list[str]:
        """Classes without an image."""
        filled = set(self.labels)
        return [name for label, name in enumerate(self.classes) if label not in filled]


def scan_class_folders(folder: Path) -> ClassFolders:
    """List the images of one split: `folder`/<class>/<image>, or deeper.

    Classes, images and their order are those of torchvision's ImageFolder, except: names that begin with a dot are left out
    (.ipynb_checkpoints, ._n01440764_18.JPEG), more suffixes are images, and where a suffix says nothing, the content does.

    Raises:
        ValueError: `folder` is missing or has no class folder.
    """
    omitted = LeftOut()
    unread: dict[str, str] = {}
    classes = [entry.name for entry in class_entries(folder, omitted)]
    if not classes:
        raise ValueError(f"the data folder {folder} has no class folder in it; {EXPECTED}")
    names: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    mtimes_ns: list[int] = []
    for label, class_name in enumerate(classes):
        if has_break(class_name):
            unread[f"{folder}/{class_name}"] = BREAK
            continue
        found = find_images(f"{folder}/{class_name}", omitted)
        names += [f"{class_name}/{name}" for name in found.names]
        labels += [label] * len(found.names)
        sizes += found.sizes
        mtimes_ns += found.mtimes_ns
        unread |= found.unread
    return ClassFolders(
        folder=folder,
        classes=tuple(classes),
        names=names,
        labels=labels,
        sizes=sizes,
        mtimes_ns=mtimes_ns,
        omitted=omitted,
        unread=unread,
    )


def class_entries(folder: Path, omitted: LeftOut) -> list[os.DirEntry[str]]:
    """The class folders in bytewise order; images beside them, which have no class, are counted."""
    classes = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
                if not is_folder(entry):
                    count_outside(entry, omitted)
                elif entry.is_symlink() and way_through(folder, entry.path) is None:
                    omitted.add(left_out.LOOP, entry.path)
                elif not is_hidden_folder(entry, omitted):
                    classes.append(entry)
    except OSError as error:
        raise ValueError(f"the data folder {folder} cannot be read ({error.strerror}); {EXPECTED}") from None
    return classes


def count_outside(entry: os.DirEntry[str], omitted: LeftOut) -> None:
    """Count a file that lies beside class folders."""
    if is_of_system(entry.name):
        omitted.add(left_out.SYSTEM, entry.path)
    elif is_image_file(entry.path):
        omitted.add(left_out.HIDDEN if entry.name.startswith(".") else left_out.OUTSIDE, entry.path)
    elif not os.path.exists(entry.path):
        omitted.add(left_out.DANGLING, entry.path)
    elif (suffix := suffix_of(entry.name)) in TEXT_SUFFIXES:
        omitted.add(left_out.TEXT, entry.path)
    elif entry.name.startswith("."):
        omitted.add(left_out.SYSTEM, entry.path)
    else:
        omitted.add_suffix(suffix, entry.path)
