"""List the images of a data set in class folders, train/<class>/ and val/<class>/.

Only names, sizes and times are read, plus the first bytes of files whose suffix says nothing. What
is not listed is counted (left_out.py).
"""

import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.decoding import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    is_image,
    is_system_file,
    is_system_folder,
    suffix_of,
)
from bitfleet.trainer.data.left_out import LeftOut, look, quoted, shown

SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
"""Lower-case names of the folder of a split; any case is accepted."""
ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's labels of the validation images: file, tab, class."""
_TINY_IMAGES = "images"
_EXPECTED = (
    "expected ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG, or the DEST of `bitfleet data prepare SOURCE "
    "DEST`, which knows ILSVRC2012's archives, the Kaggle layout, WebDataset shards and CIFAR-10"
)
_BREAK = "its name has a tab or a line break in it, which no list of images can hold: rename it"


class FoundImage(NamedTuple):
    """An image file, not read yet."""

    name: str
    """Path relative to the scanned folder."""
    num_bytes: int
    """0 if the file cannot be reached; reading its header will say why."""
    mtime_ns: int


@dataclass(kw_only=True, slots=True)
class ClassFolders:
    """The images of one split, in the order of their labels."""

    folder: Path
    classes: tuple[str, ...]
    images: list[FoundImage] = field(default_factory=list)
    """Named "<class>/<file>", "<class>/<folder>/<file>", and so on."""
    labels: list[int] = field(default_factory=list)
    omitted: LeftOut = field(default_factory=LeftOut)
    """Files that are in the folder and not listed."""
    unread: dict[str, str] = field(default_factory=dict)
    """Folders that cannot be read, and images that cannot be listed -> reason."""

    @property
    def names(self) -> list[str]:
        """Name of each image."""
        return [image.name for image in self.images]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each image."""
        return [image.num_bytes for image in self.images]

    @property
    def empty_classes(self) -> list[str]:
        """Classes without an image."""
        filled = set(self.labels)
        return [name for label, name in enumerate(self.classes) if label not in filled]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """Both splits, with the same classes."""

    train: ClassFolders
    val: ClassFolders
    others: LeftOut
    """Files next to the folders of the splits."""
    faults: tuple[str, ...]
    """Classes without images, in words: errors unless an incomplete data set is allowed."""

    @property
    def unread(self) -> dict[str, str]:
        """Folders that cannot be read, and images that cannot be listed -> reason."""
        return {**self.train.unread, **self.val.unread}


def scan_root(root: Path, name: str = "") -> Scan:
    """List the train and val splits of `root`.

    Args:
        root: The folder.
        name: What messages call it; by default data.root.

    Raises:
        ValueError: `root`, train/ or val/ is missing or has no image, or val/ has a class that
            train/ lacks.
    """
    name = name or f"data.root={str(root)!r}"
    if not root.is_dir():
        raise ValueError(f"{name} does not exist; {_EXPECTED}")
    folders = {split: split_folder(root, split) for split in SPLIT_FOLDERS}
    for split, folder in folders.items():
        if folder is None:
            if empty := split_folders(root, split):
                scan_class_folders(root / empty[0])  # raises: it has no class folder
            raise ValueError(f"{name} has no folder {split}/; {_EXPECTED}")
    train_folder, val_folder = (folders[split] or root for split in ("train", "val"))
    train = scan_class_folders(train_folder)
    is_tiny = is_tiny_imagenet(val_folder)
    val = _scan_tiny_val(val_folder, train.classes) if is_tiny else scan_class_folders(val_folder)
    for split_scan in (train, val):
        if not split_scan.images:
            counts = split_scan.omitted.counts
            others = f" ({left_out.in_words({'there are': counts})})" if counts else ""
            raise ValueError(f"no class folder of {split_scan.folder} has an image in it{others}; {_EXPECTED}")
    return _with_equal_classes(name, train, val)


def split_folders(root: Path, split: str) -> list[str]:
    """Return the names of folders in `root` that may hold a split, e.g. "Train", "validation"."""
    try:
        return sorted(
            name for name in os.listdir(root) if name.lower() in SPLIT_FOLDERS[split] and (root / name).is_dir()
        )
    except OSError:
        return []


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split that has class folders in it, or None.

    Raises:
        ValueError: There are several.
    """
    filled = [name for name in split_folders(root, split) if has_class_folder(root / name)]
    if len(filled) > 1:
        raise ValueError(
            f"{root} has {' and '.join(f'{name}/' for name in filled)}, each with class folders: remove or rename all "
            "but one"
        )
    return root / filled[0] if filled else None


def has_class_folder(folder: Path) -> bool:
    """Return True if something in `folder` may be a class."""
    return folder.is_dir() and bool(_class_entries(folder, LeftOut()))


def is_tiny_imagenet(val: Path) -> bool:
    """Return True if the validation images lie in one folder next to the table of their classes."""
    if not (val / ANNOTATIONS).is_file():
        return False
    return [entry.name for entry in _class_entries(val, LeftOut())] == [_TINY_IMAGES]


def count_others(root: Path, known: Collection[str]) -> LeftOut:
    """Count what lies in `root` besides the names in `known`, texts and hidden files."""
    others = LeftOut()
    for name in sorted(os.listdir(root)):
        is_text = suffix_of(name) in TEXT_SUFFIXES and (root / name).is_file()
        if name not in known and not is_text and not name.startswith(".") and not is_system_file(name):
            others.add(left_out.BESIDE, str(root / name))
    return others


def _with_equal_classes(name: str, train: ClassFolders, val: ClassFolders) -> Scan:
    """Give the validation images the labels of the training classes."""
    faults = [fault for split_scan in (train, val) if (fault := _empty_class_fault(split_scan))]
    if different := sorted(set(train.classes) ^ set(val.classes), key=os.fsencode):
        foreign = [class_name for class_name in different if class_name in val.classes]
        fault = _difference(name, train, val, foreign[0] if foreign else different[0])
        if foreign:
            raise ValueError(fault)
        faults.append(fault)
        label_of = {class_name: label for label, class_name in enumerate(train.classes)}
        labels = [label_of[val.classes[label]] for label in val.labels]
        val = replace(val, classes=train.classes, labels=labels)
    others = count_others(train.folder.parent, (train.folder.name, val.folder.name))
    return Scan(train=train, val=val, others=others, faults=tuple(faults))


def _difference(name: str, train: ClassFolders, val: ClassFolders, class_name: str) -> str:
    present, absent = (train, val) if class_name in train.classes else (val, train)
    twins = [other for other in absent.classes if look(other).casefold() == look(class_name).casefold()]
    alike = f" ({absent.folder.name}/ has {twins[0]!a}, which looks the same or nearly so)" if twins else ""
    return (
        f"{name} has {len(train.classes)} classes in {train.folder.name}/ and {len(val.classes)} in "
        f"{val.folder.name}/, which must be the same: {ascii(class_name) if twins else quoted(class_name)} is in "
        f"{present.folder.name}/ only{alike}; add it to {absent.folder.name}/ or remove it from {present.folder.name}/"
    )


def _empty_class_fault(split_scan: ClassFolders) -> str:
    empty = split_scan.empty_classes
    if not empty:
        return ""
    more = f" (and {len(empty) - 1:,} other classes have none)" if len(empty) > 1 else ""
    if not (split_scan.folder / empty[0]).is_dir():
        return f"{split_scan.folder / ANNOTATIONS} names no image of the class {quoted(empty[0])}{more}"
    path = split_scan.folder / shown(empty[0])
    return f"the class folder {path} has no image in it{more}; fill it or remove it from train/ and val/"


def scan_class_folders(folder: Path) -> ClassFolders:
    """List the images of one split: `folder`/<class>/<image>, or deeper.

    Classes, images and their order are those of torchvision's ImageFolder, except: names that start
    with a dot are left out (.ipynb_checkpoints, ._n01440764_18.JPEG), more suffixes are images, and
    where a suffix says nothing, the content decides.

    Raises:
        ValueError: `folder` is missing or has no class folder.
    """
    omitted = LeftOut()
    classes = tuple(entry.name for entry in _class_entries(folder, omitted))
    if not classes:
        raise ValueError(f"the data folder {folder} has no class folder in it; {_EXPECTED}")
    split_scan = ClassFolders(folder=folder, classes=classes, omitted=omitted)
    for label, class_name in enumerate(classes):
        if _has_break(class_name):
            split_scan.unread[f"{folder}/{class_name}"] = _BREAK
            continue
        images = find_images(f"{folder}/{class_name}", omitted, split_scan.unread)
        split_scan.images += [image._replace(name=f"{class_name}/{image.name}") for image in images]
        split_scan.labels += [label] * len(images)
    return split_scan


def _scan_tiny_val(folder: Path, classes: Sequence[str]) -> ClassFolders:
    """List the validation images of Tiny ImageNet, ordered by class and name."""
    class_of = _read_annotations(folder / ANNOTATIONS)
    label_of = {name: label for label, name in enumerate(classes)}
    split_scan = ClassFolders(folder=folder, classes=tuple(classes))
    omitted = split_scan.omitted
    for entry in os.scandir(folder):
        if not _is_folder(entry) and entry.name != ANNOTATIONS:
            _count_outside(entry, omitted)
    rows = []
    for image in find_images(f"{folder}/{_TINY_IMAGES}", omitted, split_scan.unread):
        name = f"{_TINY_IMAGES}/{image.name}"
        class_name = class_of.pop(os.path.basename(name), None)
        if class_name is None:
            omitted.add(left_out.NO_LABEL, f"{folder}/{name}, which has no line in {ANNOTATIONS}")
        elif class_name not in label_of:
            omitted.add(left_out.NO_CLASS, f"{folder}/{name}, of the class {quoted(class_name)}")
        else:
            rows.append((label_of[class_name], image._replace(name=name)))
    for name in class_of:
        omitted.add(left_out.NO_IMAGE, f"{quoted(name)} in {folder / ANNOTATIONS}")
    rows.sort(key=lambda row: (row[0], os.fsencode(row[1].name)))
    split_scan.labels, split_scan.images = [label for label, _ in rows], [image for _, image in rows]
    return split_scan


def _read_annotations(file: Path) -> dict[str, str]:
    """Return image -> class."""
    class_of = {}
    for number, line in enumerate(os.fsdecode(file.read_bytes()).splitlines(), start=1):
        image, *rest = line.split("\t")
        if line and not rest:
            raise ValueError(f"line {number} of {file} is {line!r}: expected an image, a tab and its class")
        if line:
            class_of[image] = rest[0]
    return class_of


def _class_entries(folder: Path, omitted: LeftOut) -> list[os.DirEntry[str]]:
    """Return the class folders in bytewise order; count images next to them."""
    classes = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
                if not _is_folder(entry):
                    _count_outside(entry, omitted)
                elif entry.is_symlink() and _crossed_with(folder, entry.path) is None:
                    omitted.add(left_out.LOOP, entry.path)
                elif not _is_hidden_folder(entry, omitted):
                    classes.append(entry)
    except OSError as error:
        raise ValueError(f"the data folder {folder} cannot be read ({error.strerror}); {_EXPECTED}") from None
    return classes


def _count_outside(entry: os.DirEntry[str], omitted: LeftOut) -> None:
    """Count a file that lies next to class folders."""
    suffix = suffix_of(entry.name)
    if is_system_file(entry.name):
        omitted.add(left_out.SYSTEM, entry.path)
    elif suffix in IMAGE_SUFFIXES or (suffix not in TEXT_SUFFIXES and _is_image_by_content(entry.path)):
        omitted.add(left_out.HIDDEN if entry.name.startswith(".") else left_out.OUTSIDE, entry.path)
    elif not os.path.exists(entry.path):
        omitted.add(left_out.DANGLING, entry.path)
    elif suffix in TEXT_SUFFIXES:
        omitted.add(left_out.TEXT, entry.path)
    elif entry.name.startswith("."):
        omitted.add(left_out.SYSTEM, entry.path)
    else:
        omitted.add_suffix(suffix, entry.path)


def find_images(top: str, omitted: LeftOut, unread: dict[str, str]) -> list[FoundImage]:
    """List the images in `top` and below: folders by path, files by name, bytewise.

    Links to folders are followed, as ImageFolder does, unless they lead back to a folder above
    them.

    Args:
        top: Path of the folder.
        omitted: Counts what else lies there.
        unread: Receives folders that cannot be read, and images that cannot be listed -> reason.
    """
    images: list[FoundImage] = []
    for folder, files in sorted(_folders(top, omitted, unread)):
        below = folder[len(os.fsencode(top)) + 1 :]
        prefix = os.fsdecode(below) + "/" if below else ""
        for name, entry in sorted(files):
            if image := _found_image(prefix + os.fsdecode(name), entry, omitted, unread):
                images.append(image)
    return images


def _folders(
    top: str, omitted: LeftOut, unread: dict[str, str]
) -> list[tuple[bytes, list[tuple[bytes, os.DirEntry[str]]]]]:
    """Return the path of `top` and of every folder below, each with its files."""
    folders = []
    pending: list[tuple[str, tuple[str, ...]]] = [(top, ())]  # each with the folders that links on the way crossed
    while pending:
        folder, crossed = pending.pop()
        files: list[tuple[bytes, os.DirEntry[str]]] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _is_folder(entry):
                        files.append((os.fsencode(entry.name), entry))
                    elif _is_hidden_folder(entry, omitted):
                        pass
                    elif not entry.is_symlink():
                        pending.append((entry.path, crossed))
                    elif (onward := _crossed_with(folder, entry.path, crossed)) is None:
                        omitted.add(left_out.LOOP, entry.path)
                    else:
                        pending.append((entry.path, onward))
        except OSError as error:
            unread[folder] = f"the folder cannot be read ({error.strerror})"
        folders.append((os.fsencode(folder), files))
    return folders


def _found_image(name: str, entry: os.DirEntry[str], omitted: LeftOut, unread: dict[str, str]) -> FoundImage | None:
    """Return a file that is an image, or count why it is not listed."""
    suffix = suffix_of(entry.name)
    has_image_suffix, is_system = suffix in IMAGE_SUFFIXES, is_system_file(entry.name)
    if entry.name[0] == ".":
        omitted.add(left_out.HIDDEN if has_image_suffix and not is_system else left_out.SYSTEM, entry.path)
        return None
    if not has_image_suffix and (suffix in TEXT_SUFFIXES or is_system):
        omitted.add(left_out.SYSTEM if is_system else left_out.TEXT, entry.path)
        return None
    try:
        status = entry.stat()
    except OSError:  # a link to nothing, or to itself: reading the header will say which
        if has_image_suffix:
            return FoundImage(name, 0, 0)
        omitted.add(left_out.DANGLING, entry.path)
        return None
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would never return
        omitted.add(left_out.IRREGULAR, entry.path)
    elif not has_image_suffix and not _is_image_by_content(entry.path):
        omitted.add_suffix(suffix, entry.path)
    elif not name.isprintable() and _has_break(name):
        unread[entry.path] = _BREAK
    else:
        return FoundImage(name, status.st_size, status.st_mtime_ns)
    return None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that this user may not enter
        return False


def _is_hidden_folder(entry: os.DirEntry[str], omitted: LeftOut) -> bool:
    """Return True if a folder is left out because of its name; its files are counted."""
    of_system = is_system_folder(entry.name)
    if not of_system and not entry.name.startswith("."):
        return False
    for folder, _, files in os.walk(entry.path):
        for name in files:
            is_photo = not of_system and suffix_of(name) in IMAGE_SUFFIXES and not is_system_file(name)
            omitted.add(left_out.HIDDEN if is_photo else left_out.SYSTEM, os.path.join(folder, name))
    return True


def _crossed_with(folder: str | os.PathLike[str], link: str, crossed: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """Return `crossed` and the two ends of `link`, or None if it leads back to a folder on the way.

    Args:
        folder: The folder that the link lies in.
        link: Its path.
        crossed: Both ends of the links on the way to `folder`.
    """
    here, there = os.path.realpath(folder), os.path.realpath(link)
    if any(f"{before}/".startswith(there.rstrip("/") + "/") for before in (*crossed, here)):
        return None
    return (*crossed, here, there)


def _has_break(name: str) -> bool:
    """Return True for a name that a list with one image per line cannot hold."""
    return any(character in name for character in "\t\n\r")


def _is_image_by_content(path: str) -> bool:
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return is_image(file.read(HEAD_BYTES))
    except OSError:
        return False
