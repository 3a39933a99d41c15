"""ImageNet as Kaggle gives it: the validation images in one folder, their labels in LOC_val_solution.csv."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from bitfleet.trainer.data.index import IMAGE_SUFFIXES, list_files, scan_class_folders
from bitfleet.trainer.data.manifest import Manifest, merge

LAYOUT = "Kaggle ILSVRC"
IMAGES = Path("Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"


def index(folder: Path, solution: Path, *, num_workers: int) -> Manifest:
    """List the images where they lie; the label is the position of the synset in alphabetical order.

    Args:
        folder: Data/CLS-LOC, with train/<synset>/ and val/.
        solution: the table ImageId,PredictionString; a prediction string begins with the synset.
        num_workers: processes.

    Raises:
        ValueError: the table cannot be read, or an image has no line in it, is unreadable, or is of no class of train/.
    """
    synset_of = _read_solution(solution)
    found = scan_class_folders(folder / "train")
    train = list_files(
        folder,
        [f"train/{name}" for name in found.names],
        found.labels,
        found.sizes,
        num_workers=num_workers,
        title="training images",
    )
    names, sizes = _scan_flat(folder / "val")
    labels = _labels(folder, names, synset_of, found.classes, solution)
    val = list_files(
        folder, [f"val/{name}" for name in names], labels, sizes, num_workers=num_workers, title="validation images"
    )
    return Manifest(train=train, val=merge([val]), classes=found.classes, layout=LAYOUT)


def _read_solution(file: Path) -> dict[str, str]:
    """Image -> synset."""
    try:
        with open(file, newline="") as lines:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(lines)}
    except (KeyError, IndexError, AttributeError, TypeError, UnicodeDecodeError, csv.Error):
        raise ValueError(
            f"{file} cannot be read: expected the columns ImageId,PredictionString and a synset first in every prediction string"
        ) from None


def _scan_flat(folder: Path) -> tuple[list[str], list[int]]:
    """Names and bytes of the images in one folder, by name."""
    with os.scandir(folder) as entries:
        images = [
            (entry.name, entry.stat().st_size)
            for entry in entries
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
        ]
    if not images:
        raise ValueError(f"the folder {folder} has no image in it; expected ILSVRC2012_val_00000001.JPEG and so on")
    images.sort(key=lambda image: os.fsencode(image[0]))
    return [name for name, _ in images], [size for _, size in images]


def _labels(
    folder: Path, names: Sequence[str], synset_of: dict[str, str], classes: Sequence[str], solution: Path
) -> list[int]:
    label_of = {name: label for label, name in enumerate(classes)}
    labels = []
    for name in names:
        if (synset := synset_of.get(Path(name).stem)) is None:
            raise ValueError(f"the image {folder / 'val' / name} has no line in {solution}; remove it or add its line")
        if synset not in label_of:
            raise ValueError(f"{solution} says {synset} for {name}, which is no folder of {folder / 'train'}")
        labels.append(label_of[synset])
    return labels
