"""Data sets in class folders: train/<class>/ and val/<class>/, images at any depth; and Tiny ImageNet's form of them."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.class_names import look, quoted, shown
from bitfleet.trainer.data.found_images import find_images, is_folder, is_hidden_folder, is_image_file, way_through
from bitfleet.trainer.data.image_kinds import TEXT_SUFFIXES, is_of_system, suffix_of
from bitfleet.trainer.data.left_out import LeftOut

ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's labels of the validation images: file, tab, class."""
_TINY_IMAGES = "images"
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
"""Names of the folder of a split, in any case."""
_EXPECTED = (
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
    """Folders that cannot be read -> why."""

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
    beside: LeftOut
    """What lies beside their folders."""
    faults: tuple[str, ...]
    """Classes without images, in words: errors, unless they are allowed."""

    @property
    def unread(self) -> dict[str, str]:
        """Folders that cannot be read -> why."""
        return {**self.train.unread, **self.val.unread}


def scan_class_folders(folder: Path) -> ClassFolders:
    """List the images of one split: `folder`/<class>/<image>, or deeper.

    Classes, images and their order are those of torchvision's ImageFolder, except: names that begin with a dot are left out
    (.ipynb_checkpoints, ._n01440764_18.JPEG), more suffixes are images, and where a suffix says nothing, the content does.

    Raises:
        ValueError: `folder` is missing or has no class folder.
    """
    omitted = LeftOut()
    unread: dict[str, str] = {}
    classes = [entry.name for entry in _class_entries(folder, omitted)]
    if not classes:
        raise ValueError(f"the data folder {folder} has no class folder in it; {_EXPECTED}")
    names: list[str] = []
    labels: list[int] = []
    sizes: list[int] = []
    mtimes_ns: list[int] = []
    for label, class_name in enumerate(classes):
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


def _class_entries(folder: Path, omitted: LeftOut) -> list[os.DirEntry[str]]:
    """The class folders in bytewise order; images beside them, which have no class, are counted."""
    classes = []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
                if not is_folder(entry):
                    _count_outside(entry, omitted)
                elif entry.is_symlink() and way_through(folder, entry.path) is None:
                    omitted.add(left_out.LOOP, entry.path)
                elif not is_hidden_folder(entry, omitted):
                    classes.append(entry)
    except OSError as error:
        raise ValueError(f"the data folder {folder} cannot be read ({error.strerror}); {_EXPECTED}") from None
    return classes


def _count_outside(entry: os.DirEntry[str], omitted: LeftOut) -> None:
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
    return folder.is_dir() and bool(_class_entries(folder, LeftOut()))


def is_tiny_imagenet(val: Path) -> bool:
    """Whether the validation images lie in one folder beside the table of their classes."""
    return (val / ANNOTATIONS).is_file() and [entry.name for entry in _class_entries(val, LeftOut())] == [_TINY_IMAGES]


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
        raise ValueError(f"{name} does not exist; {_EXPECTED}")
    folders = {split: split_folder(root, split) for split in SPLIT_FOLDERS}
    for split, folder in folders.items():
        if folder is None:
            if there := split_folders(root, split):
                scan_class_folders(root / there[0])  # says that it has no class folder
            raise ValueError(f"{name} has no folder {split}/; {_EXPECTED}")
    train_folder, val_folder = (folders[split] or root for split in ("train", "val"))
    train = scan_class_folders(train_folder)
    is_tiny = is_tiny_imagenet(val_folder)
    val = _scan_tiny(val_folder, train.classes) if is_tiny else scan_class_folders(val_folder)
    for found in (train, val):
        if not found.names:
            raise ValueError(
                f"no class folder of {found.folder} has an image in it{_and_has(found.omitted)}; {_EXPECTED}"
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


def _scan_tiny(folder: Path, classes: Sequence[str]) -> ClassFolders:
    """The validation images of Tiny ImageNet, in the order of classes and names."""
    class_of = _read_annotations(folder / ANNOTATIONS)
    label_of = {name: label for label, name in enumerate(classes)}
    omitted = LeftOut()
    for entry in os.scandir(folder):
        if not is_folder(entry) and entry.name != ANNOTATIONS:
            _count_outside(entry, omitted)
    found = find_images(f"{folder}/{_TINY_IMAGES}", omitted)
    rows = []
    for name, size, mtime_ns in zip(found.names, found.sizes, found.mtimes_ns, strict=True):
        path = f"{_TINY_IMAGES}/{name}"
        class_name = class_of.pop(os.path.basename(name), None)
        if class_name is None:
            omitted.add(left_out.NO_LABEL, f"{folder}/{path}, which has no line in {ANNOTATIONS}")
        elif class_name not in label_of:
            omitted.add(left_out.NO_CLASS, f"{folder}/{path}, of the class {quoted(class_name)}")
        else:
            rows.append((label_of[class_name], path, size, mtime_ns))
    for name in class_of:
        omitted.add(left_out.NO_IMAGE, f"{quoted(name)} in {folder / ANNOTATIONS}")
    rows.sort(key=lambda row: (row[0], os.fsencode(row[1])))
    return ClassFolders(
        folder=folder,
        classes=tuple(classes),
        names=[path for _, path, _, _ in rows],
        labels=[label for label, _, _, _ in rows],
        sizes=[size for _, _, size, _ in rows],
        mtimes_ns=[mtime_ns for _, _, _, mtime_ns in rows],
        omitted=omitted,
        unread=found.unread,
    )


def _read_annotations(file: Path) -> dict[str, str]:
    """Image -> class."""
    class_of = {}
    for number, line in enumerate(os.fsdecode(file.read_bytes()).splitlines(), start=1):
        image, *rest = line.split("\t")
        if line and not rest:
            raise ValueError(f"line {number} of {file} is {line!r}: expected an image, a tab and its class")
        if line:
            class_of[image] = rest[0]
    return class_of
