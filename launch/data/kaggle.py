"""ImageNet as Kaggle gives it: the validation images in one folder, their labels in LOC_val_solution.csv."""

import csv
from collections.abc import Sequence
from pathlib import Path

from bitfleet.launch.data.listing import Listing
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.class_folders import scan_class_folders
from bitfleet.trainer.data.found_images import FoundImages, find_images
from bitfleet.trainer.data.index import list_files
from bitfleet.trainer.data.left_out import LeftOut
from bitfleet.trainer.data.manifest import Manifest, merge

LAYOUT = "Kaggle ILSVRC"
IMAGES = Path("Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"


def index(folder: Path, solution: Path, *, num_workers: int) -> Listing:
    """List the images where they lie; the label is the position of the synset in alphabetical order.

    Args:
        folder: Data/CLS-LOC, with train/<synset>/ and val/.
        solution: the table ImageId,PredictionString; a prediction string begins with the synset.
        num_workers: processes.

    Raises:
        ValueError: the table cannot be read, or names a class that train/ has not, or there is no image.
    """
    synset_of = _read_solution(solution)
    found = scan_class_folders(folder / "train")
    if not found.names:
        raise ValueError(f"no class folder of {folder / 'train'} has an image in it")
    train, unreadable = list_files(
        folder,
        [f"train/{name}" for name in found.names],
        found.labels,
        found.sizes,
        num_workers=num_workers,
        title="training images",
    )
    omitted = LeftOut()
    images = find_images(f"{folder}/val", omitted)
    names, labels, sizes = _labelled(folder, images, synset_of, found.classes, solution, omitted)
    if not names:
        raise ValueError(
            f"the folder {folder / 'val'} has no image in it; expected ILSVRC2012_val_00000001.JPEG and so on"
        )
    val, reasons = list_files(
        folder, [f"val/{name}" for name in names], labels, sizes, num_workers=num_workers, title="validation images"
    )
    return Listing(
        manifest=Manifest(train=train, val=merge([val]), classes=found.classes, layout=LAYOUT),
        omitted={"train": found.omitted, "val": omitted},
        unreadable=unreadable | reasons,
        unread={**found.unread, **images.unread},
    )


def _read_solution(file: Path) -> dict[str, str]:
    """Image -> synset."""
    try:
        with open(file, newline="") as lines:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(lines)}
    except (KeyError, IndexError, AttributeError, TypeError, UnicodeDecodeError, csv.Error):
        raise ValueError(
            f"{file} cannot be read: expected the columns ImageId,PredictionString and a synset first in every prediction string"
        ) from None


def _labelled(
    folder: Path,
    images: FoundImages,
    synset_of: dict[str, str],
    classes: Sequence[str],
    solution: Path,
    omitted: LeftOut,
) -> tuple[list[str], list[int], list[int]]:
    """Names, labels and bytes of the validation images that the table has a line for; the others are counted."""
    label_of = {name: label for label, name in enumerate(classes)}
    names, labels, sizes = [], [], []
    without_image = dict(synset_of)
    for name, size in zip(images.names, images.sizes, strict=True):
        stem = Path(name).stem
        without_image.pop(stem, None)
        if (synset := synset_of.get(stem)) is None:
            omitted.add(left_out.NO_LABEL, f"{folder / 'val' / name}, which has no line in {solution}")
            continue
        if synset not in label_of:
            raise ValueError(f"{solution} says {synset} for {name}, which is no folder of {folder / 'train'}")
        names.append(name)
        labels.append(label_of[synset])
        sizes.append(size)
    for stem in without_image:
        omitted.add(left_out.NO_IMAGE, f"{stem} in {solution}")
    return names, labels, sizes
