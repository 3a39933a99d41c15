"""Kaggle's table of validation labels, and what is wrong with it."""

from pathlib import Path

import pytest

from bitfleet.trainer.data import kaggle
from tests.unit.trainer.data import miniature


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return miniature.kaggle(tmp_path / "source")


def index(source: Path) -> kaggle.Manifest:
    return kaggle.index(source / "ILSVRC/Data/CLS-LOC", source / "LOC_val_solution.csv", num_workers=1)


def test_labels_are_those_of_the_table_in_the_order_of_classes(source: Path) -> None:
    val = index(source).val
    named = {val.name(i): miniature.SYNSETS[val.labels[i]] for i in range(len(val))}
    assert named == {f"val/{n}": s for n, s in zip(miniature.val_photos(), miniature.VAL_SYNSETS, strict=True)}
    order = [(int(label), val.name(i)) for i, label in enumerate(val.labels)]
    assert order == sorted(order)


def test_an_image_without_line_is_named(source: Path) -> None:
    image = source / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000007.JPEG"
    image.write_bytes(miniature.photo(0, 1))
    with pytest.raises(ValueError, match=f"{image} has no line in"):
        index(source)


def test_an_unknown_synset_is_named(source: Path) -> None:
    table = source / "LOC_val_solution.csv"
    table.write_text(table.read_text().replace("ILSVRC2012_val_00000002,n02105855", "ILSVRC2012_val_00000002,n9"))
    with pytest.raises(ValueError, match="says n9 for ILSVRC2012_val_00000002.JPEG"):
        index(source)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "image,label\na,n1\n",
        "ImageId,PredictionString\nILSVRC2012_val_00000001\n",
        "ImageId,PredictionString\na,\n",
    ],
)
def test_another_table_is_refused(source: Path, text: str) -> None:
    (source / "LOC_val_solution.csv").write_text(text)
    with pytest.raises(ValueError, match="cannot be read: expected the columns|has no line in"):
        index(source)


def test_no_validation_image(source: Path) -> None:
    for image in (source / "ILSVRC/Data/CLS-LOC/val").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="CLS-LOC/val has no image in it"):
        index(source)
