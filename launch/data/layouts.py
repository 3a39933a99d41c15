"""The forms in which people hold ImageNet and CIFAR-10, and how to tell which of them lies in a folder."""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitfleet.launch.data import archives, cifar, kaggle, webdataset
from bitfleet.launch.data.compressed_shards import SHARD_SUFFIXES, is_compressed
from bitfleet.launch.data.listing import Listing, list_scan
from bitfleet.trainer.data.class_names import shown
from bitfleet.trainer.data.splits import has_class_folder, scan_root, split_folder, split_folders, things_beside
from bitfleet.trainer.data.tiny_imagenet import ANNOTATIONS, is_tiny_imagenet

CLASS_FOLDERS = "class folders"
TINY_IMAGENET = "Tiny ImageNet"

_SPLIT_NAMES = {
    "train": re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE),
    "val": re.compile(r"(?<![a-z])val(id(ation)?)?(?![a-z])", re.IGNORECASE),
}
_PACKED = (".zip", ".rar", ".7z", ".tar.zst", *SHARD_SUFFIXES)
_MOST_LOOKED_AT, _MOST_NAMED = 100, 5  # things in a folder that is no data set
_KNOWN = (
    f"looked for: {archives.TRAIN_FILE}, {archives.VAL_FILE} and {archives.DEVKIT_FILE}; class folders train/<class>/ and "
    f"val/<class>/; Tiny ImageNet's train/<class>/images/ and val/images/ with {ANNOTATIONS}; Kaggle's "
    f"ILSVRC/{kaggle.IMAGES}/ with {kaggle.SOLUTION}; WebDataset shards *.tar whose names say train and val, or in train/ and "
    f"val/; {cifar.ARCHIVE} or {cifar.FOLDER}/"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set in one of the forms."""

    layout: str
    """Its name."""
    make: Callable[..., Listing]
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
    try:
        found, partial = _look(source)
    except OSError as error:
        raise ValueError(
            f"SOURCE {source} cannot be read ({error.strerror}: {error.filename}); give this user leave to read it"
        ) from None
    if len(found) > 1:
        raise ValueError(
            f"SOURCE {source} has data in more than one form ({', '.join(one.layout for one in found)}): give a folder that has "
            "one of them, of links if need be"
        )
    if found:
        return found[0]
    if partial:
        raise ValueError(f"SOURCE {source}: {'; '.join(partial)}")
    raise ValueError(f"SOURCE {source} has no data set in a form that is known{_what_lies_in(source)}; {_KNOWN}")


def _look(source: Path) -> tuple[list[Source], list[str]]:
    """The forms in `source`, and in words those that are there in part."""
    found, partial = [], []
    for look in (_archives, _class_folders, _kaggle, _shards, _cifar_in):
        try:
            if one := look(source):
                found.append(one)
        except _Partial as error:
            partial.append(str(error))
    return found, partial


def _what_lies_in(source: Path) -> str:
    """A data set one folder deeper, or the names of what is there."""
    names = sorted((name for name in os.listdir(source) if not name.startswith(".")), key=os.fsencode)
    for folder in (source / name for name in names[:_MOST_LOOKED_AT]):
        if folder.is_dir() and (found := _look(folder)[0]):
            return f"; {folder} has one ({found[0].layout}): give that"
    if packed := [name for name in names if name.lower().endswith(_PACKED)]:
        return f"; unpack {', '.join(map(shown, packed[:_MOST_NAMED]))} first"
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f" (there is {', '.join(map(shown, names[:_MOST_NAMED]))}{more})" if names else " (it is empty)"


def _archives(source: Path) -> Source | None:
    names = (archives.TRAIN_FILE, archives.VAL_FILE, archives.DEVKIT_FILE)
    places = {name: source / name for name in names if (source / name).is_file()}
    if archives.TRAIN_FILE not in places and (unpacked := _class_archives(source)):
        places[archives.TRAIN_FILE] = unpacked
    if not places:
        return None
    there = [name if places[name].is_file() else f"{places[name]}/n*.tar" for name in names if name in places]
    if missing := [name for name in names if name not in places]:
        raise _Partial(
            f"of ILSVRC2012's archives there is {', '.join(there)}, and {', '.join(missing)} is missing beside it"
        )
    train, val, devkit = (places[name] for name in names)
    return Source(
        layout=archives.LAYOUT,
        make=functools.partial(archives.extract, train, val, devkit),
        extracted=(train, val, devkit),
    )


def _class_archives(source: Path) -> Path | None:
    """The folder that ILSVRC2012's training archive was unpacked into: archives of the classes."""
    places = (
        source / Path(archives.TRAIN_FILE).stem,
        *(source / name for name in split_folders(source, "train")),
        source,
    )
    return next((place for place in places if archives.is_folder_of_class_archives(place)), None)


def _class_folders(source: Path) -> Source | None:
    folders = {split: split_folder(source, split) for split in ("train", "val")}
    train, val = folders["train"], folders["val"]
    if train is None and val is None:
        return None
    if train is None or val is None:
        there = folders["train"] or folders["val"]
        missing = "val" if val is None else "train"
        state = "has no class folder in it" if split_folders(source, missing) else "is missing"
        hint = (
            f" (Kaggle's form? Then give the folder above ILSVRC/, with {kaggle.SOLUTION})" if missing == "val" else ""
        )
        if missing == "val" and has_class_folder(source / "test"):
            hint = " (test/ has class folders: if its images are for validation, rename it, or link val/ to it)"
        assert there
        raise _Partial(f"there are class folders in {there.name}/, but the folder {missing}/ {state}{hint}")
    layout = TINY_IMAGENET if is_tiny_imagenet(val) else CLASS_FOLDERS
    return Source(layout=layout, make=functools.partial(_index_class_folders, source, layout))


def _index_class_folders(root: Path, layout: str, *, num_workers: int) -> Listing:
    return list_scan(root, scan_root(root, str(root)), layout, num_workers=num_workers)


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
    folders = {split: split_folders(source, split) for split in _SPLIT_NAMES}
    for split, name in _SPLIT_NAMES.items():
        flat = [file for file in _tars(source) if name.search(file) and not file.startswith("ILSVRC2012_img_")]
        below = [f"{folder}/{file}" for folder in folders[split] for file in _tars(source / folder)]
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
    everything = (*shards["train"], *shards["val"])
    splits = [*folders["train"], *folders["val"]]
    beside = things_beside(source, {*everything, *splits})
    for folder in splits:
        beside.update(things_beside(source / folder, _tars(source / folder)))
    lists, is_packed = (source, shards["train"], shards["val"]), any(map(is_compressed, everything))
    make = webdataset.unpack_and_index if is_packed else webdataset.index
    return Source(
        layout=webdataset.LAYOUT,
        make=functools.partial(make, *lists, beside=beside),
        extracted=tuple(source / shard for shard in everything) if is_packed else (),
    )


def _cifar_in(source: Path) -> Source | None:
    if source.name == cifar.FOLDER:
        return _cifar(source)
    # The batches first: torchvision leaves the archive beside them.
    return next((_cifar(source / name) for name in (cifar.FOLDER, cifar.ARCHIVE) if (source / name).exists()), None)


def _cifar(place: Path) -> Source:
    return Source(layout=cifar.LAYOUT, make=functools.partial(cifar.extract, place), extracted=(place,))


def _tars(folder: Path) -> list[str]:
    if not folder.is_dir() or archives.is_folder_of_class_archives(folder):
        return []
    names = os.listdir(folder)
    known = (archives.TRAIN_FILE, archives.VAL_FILE, archives.DEVKIT_FILE, cifar.ARCHIVE)
    return [name for name in names if name.lower().endswith(SHARD_SUFFIXES) and name not in known and name[0] != "."]
