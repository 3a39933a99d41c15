"""The forms in which people hold ImageNet and CIFAR-10, and how to tell which of them lies in a folder."""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitfleet.trainer.data import archives, cifar, kaggle, webdataset
from bitfleet.trainer.data.index import list_files, scan_class_folders
from bitfleet.trainer.data.manifest import Manifest

CLASS_FOLDERS = "class folders"

_SPLIT_NAMES = {
    "train": re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE),
    "val": re.compile(r"(?<![a-z])val(id(ation)?)?(?![a-z])", re.IGNORECASE),
}
_KNOWN = (
    f"looked for: {archives.TRAIN_FILE}, {archives.VAL_FILE} and {archives.DEVKIT_FILE}; class folders train/<class>/ and "
    f"val/<class>/; Kaggle's ILSVRC/{kaggle.IMAGES}/ with {kaggle.SOLUTION}; WebDataset shards *.tar whose names say train and "
    f"val, or in train/ and val/; {cifar.ARCHIVE} or {cifar.FOLDER}/"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set in one of the forms."""

    layout: str
    """Its name."""
    make: Callable[..., Manifest]
    """Called with num_workers and, where images are extracted, into: the folder for them."""
    extracted: tuple[Path, ...] = ()
    """Archives or folders that the images are extracted from; empty where they are read where they lie."""


class _Partial(Exception):
    """A form is there in part; the message says what is missing."""


def recognise(source: Path) -> Source:
    """Tell the form of the data set in `source`, a folder or, for CIFAR-10, its archive.

    Raises:
        ValueError: there is none, it is there in part, or there are several.
    """
    if not source.exists():
        raise ValueError(f"SOURCE {source} does not exist; {_KNOWN}")
    if source.is_file():
        if source.name == cifar.ARCHIVE:
            return _cifar(source)
        raise ValueError(
            f"SOURCE {source} is a file; give the folder that it lies in (only {cifar.ARCHIVE} may be a file)"
        )
    found, partial = [], []
    for look in (_archives, _class_folders, _kaggle, _shards, _cifar_in):
        try:
            if one := look(source):
                found.append(one)
        except _Partial as error:
            partial.append(str(error))
    if len(found) > 1:
        raise ValueError(
            f"SOURCE {source} has data in more than one form ({', '.join(one.layout for one in found)}): give a folder that has "
            "one of them, of links if need be"
        )
    if found:
        return found[0]
    if partial:
        raise ValueError(f"SOURCE {source}: {'; '.join(partial)}")
    raise ValueError(f"SOURCE {source} has no data set in a form that is known; {_KNOWN}")


def _archives(source: Path) -> Source | None:
    names = (archives.TRAIN_FILE, archives.VAL_FILE, archives.DEVKIT_FILE)
    there = [name for name in names if (source / name).is_file()]
    if not there:
        return None
    if missing := [name for name in names if name not in there]:
        raise _Partial(
            f"of ILSVRC2012's archives there is {', '.join(there)}, and {', '.join(missing)} is missing beside it"
        )
    train, val, devkit = (source / name for name in names)
    return Source(
        layout=archives.LAYOUT,
        make=functools.partial(archives.extract, train, val, devkit),
        extracted=(train, val, devkit),
    )


def _class_folders(source: Path) -> Source | None:
    with_classes = [split for split in ("train", "val") if _has_folder(source / split)]
    if not with_classes:
        return None
    if len(with_classes) == 1:
        (there,) = with_classes
        missing = "val" if there == "train" else "train"
        state = "has no class folder in it" if (source / missing).is_dir() else "is missing"
        hint = (
            f" (Kaggle's form? Then give the folder above ILSVRC/, with {kaggle.SOLUTION})" if missing == "val" else ""
        )
        raise _Partial(f"there are class folders in {there}/, but the folder {missing}/ {state}{hint}")
    return Source(layout=CLASS_FOLDERS, make=functools.partial(_index_class_folders, source))


def _index_class_folders(root: Path, *, num_workers: int) -> Manifest:
    splits = {split: scan_class_folders(root / split) for split in ("train", "val")}
    train, val = splits["train"].classes, splits["val"].classes
    if different := sorted(set(train) ^ set(val), key=os.fsencode):
        present, absent = ("train", "val") if different[0] in train else ("val", "train")
        raise ValueError(
            f"{root} has {len(train)} classes in train/ and {len(val)} in val/, which must be the same: {different[0]!r} is in "
            f"{present}/ only; add it to {absent}/ or remove it from {present}/"
        )
    lists = {
        split: list_files(
            root,
            [f"{split}/{name}" for name in found.names],
            found.labels,
            found.sizes,
            num_workers=num_workers,
            title="training images" if split == "train" else "validation images",
        )
        for split, found in splits.items()
    }
    return Manifest(train=lists["train"], val=lists["val"], classes=train, layout=CLASS_FOLDERS)


def _kaggle(source: Path) -> Source | None:
    above = source / "ILSVRC" if (source / "ILSVRC" / kaggle.IMAGES).is_dir() else source
    folder = above / kaggle.IMAGES
    if not folder.is_dir():
        return None
    if missing := [split for split in ("train", "val") if not (folder / split).is_dir()]:
        raise _Partial(f"Kaggle's folder {folder} has no folder {missing[0]}/")
    places = (above, above.parent)
    for place in places:
        if (place / kaggle.SOLUTION).is_file():
            return Source(layout=kaggle.LAYOUT, make=functools.partial(kaggle.index, folder, place / kaggle.SOLUTION))
    raise _Partial(
        f"Kaggle's {kaggle.IMAGES} is there, and {kaggle.SOLUTION}, which has the labels of val/, is missing in "
        f"{' and '.join(map(str, places))}"
    )


def _shards(source: Path) -> Source | None:
    shards: dict[str, list[str]] = {}
    for split, name in _SPLIT_NAMES.items():
        flat = [file for file in _tars(source) if name.search(file) and not file.startswith("ILSVRC2012_img_")]
        below = [f"{split}/{file}" for file in _tars(source / split)]
        shards[split] = sorted(flat + below, key=os.fsencode)
    if not any(shards.values()):
        return None
    if both := sorted(set(shards["train"]) & set(shards["val"])):
        raise _Partial(f"the name of the shard {both[0]} says train and val; rename it, or put it into train/ or val/")
    for split, other in (("train", "val"), ("val", "train")):
        if not shards[split]:
            raise _Partial(
                f"there are shards of {other} ({shards[other][0]}), and none of {split}: both must be in shards"
            )
    return Source(
        layout=webdataset.LAYOUT,
        make=functools.partial(webdataset.index, source, shards["train"], shards["val"]),
    )


def _cifar_in(source: Path) -> Source | None:
    if source.name == cifar.FOLDER:
        return _cifar(source)
    # The batches first: torchvision leaves the archive beside them.
    return next((_cifar(source / name) for name in (cifar.FOLDER, cifar.ARCHIVE) if (source / name).exists()), None)


def _cifar(place: Path) -> Source:
    return Source(layout=cifar.LAYOUT, make=functools.partial(cifar.extract, place), extracted=(place,))


def _has_folder(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())


def _tars(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return [name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith(".")]
