"""Tiny ImageNet's validation images: one folder, and a table of their classes."""

import os
from collections.abc import Sequence
from pathlib import Path

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.class_folders import ClassFolders, class_entries, count_outside
from bitfleet.trainer.data.class_names import quoted
from bitfleet.trainer.data.found_images import find_images, is_folder
from bitfleet.trainer.data.left_out import LeftOut

ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's labels of the validation images: file, tab, class."""
_TINY_IMAGES = "images"


def is_tiny_imagenet(val: Path) -> bool:
    """Whether the validation images lie in one folder beside the table of their classes."""
    return (val / ANNOTATIONS).is_file() and [entry.name for entry in class_entries(val, LeftOut())] == [_TINY_IMAGES]


def scan_val(folder: Path, classes: Sequence[str]) -> ClassFolders:
    """The validation images of Tiny ImageNet, in the order of classes and names."""
    class_of = _read_annotations(folder / ANNOTATIONS)
    label_of = {name: label for label, name in enumerate(classes)}
    omitted = LeftOut()
    for entry in os.scandir(folder):
        if not is_folder(entry) and entry.name != ANNOTATIONS:
            count_outside(entry, omitted)
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
