"""The two splits of a data set in class folders: which folders they are, and that they have the same classes."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.class_folders import EXPECTED, ClassFolders, class_entries, scan_class_folders
from bitfleet.trainer.data.class_names import look, quoted, shown
from bitfleet.trainer.data.image_kinds import TEXT_SUFFIXES, is_of_system, suffix_of
from bitfleet.trainer.data.left_out import LeftOut
from bitfleet.trainer.data.tiny_imagenet import ANNOTATIONS, is_tiny_imagenet, scan_val

SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
"""Names of the folder of a split, in any case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """Both splits, with the same classes."""

    train: ClassFolders
    val: ClassFolders
    beside: LeftOut
    """What lies beside their folders."""
    faults: tuple[str, ...]
    """Classes without images, in words: errors, unless they are allowed."""

    @property
    def unread(self) -> dict[str, str]:
        """Folders that cannot be read, and images that cannot be listed -> why."""
        return {**self.train.unread, **self.val.unread}


def split_folders(root: Path, split: str) -> list[str]:
    """Names of the folders of a split in `root`: train or training; val, valid or validation; in any case."""
    try:
        return sorted(
            name for name in os.listdir(root) if name.lower() in SPLIT_FOLDERS[split] and (root / name).is_dir()
        )
    except OSError:
        return []


def split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split that has class folders in it; None where there is none.

    Raises:
        ValueError: there are several.
    """
    filled = [name for name in split_folders(root, split) if has_class_folder(root / name)]
    if len(filled) > 1:
        raise ValueError(
            f"{root} has {' and '.join(f'{name}/' for name in filled)}, each with class folders: remove or rename all but one"
        )
    return root / filled[0] if filled else None


def has_class_folder(folder: Path) -> bool:
    """Whether something in `folder` may be a class."""
    return folder.is_dir() and bool(class_entries(folder, LeftOut()))


def scan_root(root: Path, name: str = "") -> Scan:
    """List the train and val splits of `root`.

    Args:
        root: the folder.
        name: what messages call it.

    Raises:
        ValueError: `root`, train/ or val/ is missing or has no image, or val/ has a class that train/ has not.
    """
    name = name or f"data.root={str(root)!r}"
    if not root.is_dir():
        raise ValueError(f"{name} does not exist; {EXPECTED}")
    folders = {split: split_folder(root, split) for split in SPLIT_FOLDERS}
    for split, folder in folders.items():
        if folder is None:
            if there := split_folders(root, split):
                scan_class_folders(root / there[0])  # says that it has no class folder
            raise ValueError(f"{name} has no folder {split}/; {EXPECTED}")
    train_folder, val_folder = (folders[split] or root for split in ("train", "val"))
    train = scan_class_folders(train_folder)
    is_tiny = is_tiny_imagenet(val_folder)
    val = scan_val(val_folder, train.classes) if is_tiny else scan_class_folders(val_folder)
    for found in (train, val):
        if not found.names:
            raise ValueError(
                f"no class folder of {found.folder} has an image in it{_and_has(found.omitted)}; {EXPECTED}"
            )
    return _with_equal_classes(name, train, val)


def _and_has(omitted: LeftOut) -> str:
    return f" ({left_out.in_words({'there are': omitted.counts})})" if omitted.counts else ""


def _with_equal_classes(name: str, train: ClassFolders, val: ClassFolders) -> Scan:
    """Give the validation images the labels of the training images."""
    faults = [fault for found in (train, val) if (fault := _empty(found))]
    if different := sorted(set(train.classes) ^ set(val.classes), key=os.fsencode):
        foreign = [each for each in different if each in val.classes]
        fault = _difference(name, train, val, foreign[0] if foreign else different[0])
        if foreign:
            raise ValueError(fault)
        faults.append(fault)
        label_of = {each: label for label, each in enumerate(train.classes)}
        val = ClassFolders(
            folder=val.folder,
            classes=train.classes,
            names=val.names,
            labels=[label_of[val.classes[label]] for label in val.labels],
            sizes=val.sizes,
            mtimes_ns=val.mtimes_ns,
            omitted=val.omitted,
            unread=val.unread,
        )
    beside = things_beside(train.folder.parent, (train.folder.name, val.folder.name))
    return Scan(train=train, val=val, beside=beside, faults=tuple(faults))


def things_beside(root: Path, known: Collection[str]) -> LeftOut:
    """Count what lies in `root` beside the names in `known`, texts and hidden files apart."""
    beside = LeftOut()
    for name in sorted(os.listdir(root)):
        is_text = suffix_of(name) in TEXT_SUFFIXES and (root / name).is_file()
        if name not in known and not is_text and not name.startswith(".") and not is_of_system(name):
            beside.add(left_out.BESIDE, str(root / name))
    return beside


def _difference(name: str, train: ClassFolders, val: ClassFolders, one: str) -> str:
    present, absent = (train, val) if one in train.classes else (val, train)
    twins = [other for other in absent.classes if look(other).casefold() == look(one).casefold()]
    alike = f" ({absent.folder.name}/ has {twins[0]!a}, which looks the same or nearly so)" if twins else ""
    return (
        f"{name} has {len(train.classes)} classes in {train.folder.name}/ and {len(val.classes)} in {val.folder.name}/, which "
        f"must be the same: {ascii(one) if twins else quoted(one)} is in {present.folder.name}/ only{alike}; add it to "
        f"{absent.folder.name}/ or remove it from {present.folder.name}/"
    )


def _empty(found: ClassFolders) -> str:
    empty = found.empty_classes
    if not empty:
        return ""
    place = found.folder / shown(empty[0])
    many = f" (and {len(empty) - 1:,} other classes have none)" if len(empty) > 1 else ""
    if not (found.folder / empty[0]).is_dir():
        return f"{found.folder / ANNOTATIONS} names no image of the class {quoted(empty[0])}{many}"
    return f"the class folder {place} has no image in it{many}; fill it or remove it from train/ and val/"
