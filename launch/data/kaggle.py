"""Layout: ImageNet from Kaggle, with the validation labels in LOC_val_solution.csv."""

import csv
import functools
from pathlib import Path

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.source import Listing, PartialLayout, Source, list_images, merge, register_layout
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.image_list import Manifest
from bitfleet.trainer.data.scan import ClassFolders, count_others, find_images, scan_class_folders

IMAGES = Path("Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"


@register_layout(f"Kaggle's ILSVRC/{IMAGES}/ with {SOLUTION}")
def detect(source: Path) -> Source | None:
    """Return the data set of Kaggle in `source`, or None."""
    above = source / "ILSVRC" if (source / "ILSVRC" / IMAGES).is_dir() else source
    folder = above / IMAGES
    if not folder.is_dir():
        return None
    if missing := [split for split in ("train", "val") if not (folder / split).is_dir()]:
        raise PartialLayout(f"Kaggle's folder {folder} has no folder {missing[0]}/")
    places = (above, above.parent)
    for place in places:
        if (place / SOLUTION).is_file():
            make = functools.partial(list_kaggle, folder, place / SOLUTION)
            return Source(layout="Kaggle ILSVRC", make=make, counts=imagenet.ILSVRC2012)
    raise PartialLayout(
        f"Kaggle's {IMAGES} is there, and {SOLUTION}, which has the labels of val/, is missing in "
        f"{' and '.join(map(str, places))}"
    )


def list_kaggle(folder: Path, solution: Path, *, num_workers: int) -> Listing:
    """List the images where they lie; labels number the synsets in alphabetical order.

    Args:
        folder: Data/CLS-LOC, with train/<synset>/ and val/.
        solution: Table ImageId,PredictionString; a prediction string starts with the synset.
        num_workers: Number of processes.

    Raises:
        ValueError: The table cannot be read or names a class that train/ lacks, or there is no
            image.
    """
    synset_of = _read_solution(solution)
    scanned = scan_class_folders(folder / "train")
    if not scanned.images:
        raise ValueError(f"no class folder of {folder / 'train'} has an image in it")
    train, unreadable = list_images(folder, "train", scanned, num_workers=num_workers)
    scanned_val = _scan_val(folder / "val", synset_of, scanned.classes, solution)
    if not scanned_val.images:
        raise ValueError(
            f"the folder {folder / 'val'} has no image in it; expected ILSVRC2012_val_00000001.JPEG and so on"
        )
    val, unreadable_val = list_images(folder, "val", scanned_val, num_workers=num_workers)
    return Listing(
        manifest=Manifest(train=train, val=merge([val]), classes=scanned.classes, layout="Kaggle ILSVRC"),
        omitted={
            "train": scanned.omitted,
            "val": scanned_val.omitted,
            "root": count_others(folder, ("train", "val")),
        },
        unreadable=unreadable | unreadable_val,
        unread={**scanned.unread, **scanned_val.unread},
    )


def _read_solution(file: Path) -> dict[str, str]:
    """Return image -> synset."""
    try:
        with open(file, newline="") as lines:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(lines)}
    except (KeyError, IndexError, AttributeError, TypeError, UnicodeDecodeError, csv.Error):
        raise ValueError(
            f"{file} cannot be read: expected the columns ImageId,PredictionString and a synset first in every "
            "prediction string"
        ) from None


def _scan_val(folder: Path, synset_of: dict[str, str], classes: tuple[str, ...], solution: Path) -> ClassFolders:
    """List the validation images that the table has a line for; count the others."""
    scanned = ClassFolders(folder=folder, classes=classes)
    label_of = {name: label for label, name in enumerate(classes)}
    without_image = dict(synset_of)
    for image in find_images(str(folder), scanned.omitted, scanned.unread):
        stem = Path(image.name).stem
        without_image.pop(stem, None)
        if (synset := synset_of.get(stem)) is None:
            scanned.omitted.add(left_out.NO_LABEL, f"{folder / image.name}, which has no line in {solution}")
            continue
        if synset not in label_of:
            raise ValueError(f"{solution} says {synset} for {image.name}, which is not a folder of train/")
        scanned.images.append(image)
        scanned.labels.append(label_of[synset])
    for stem in without_image:
        scanned.omitted.add(left_out.NO_IMAGE, f"{stem} in {solution}")
    return scanned
