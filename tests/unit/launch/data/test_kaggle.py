"""Kaggle's table of validation labels, and what is wrong with it."""

from pathlib import Path

import pytest

from bitfleet.launch.data import kaggle
from bitfleet.launch.data.source import Listing
from bitfleet.trainer.data import left_out
from tests import miniature


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return miniature.kaggle(tmp_path / "source")


def index(source: Path) -> Listing:
    return kaggle.list_kaggle(source / "ILSVRC/Data/CLS-LOC", source / "LOC_val_solution.csv", num_workers=1)


def test_labels_are_those_of_the_table_in_the_order_of_classes(source: Path) -> None:
    val = index(source).manifest.val
    named = {val.name(i): miniature.SYNSETS[val.labels[i]] for i in range(len(val))}
    assert named == {f"val/{n}": s for n, s in zip(miniature.val_photos(), miniature.VAL_SYNSETS, strict=True)}
    order = [(int(label), val.name(i)) for i, label in enumerate(val.labels)]
    assert order == sorted(order)


def test_an_image_without_line_and_a_line_without_image_are_counted(source: Path) -> None:
    image = source / "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000007.JPEG"
    image.write_bytes(miniature.photo(0, 1))
    (image.parent / "ILSVRC2012_val_00000002.JPEG").unlink()
    listing = index(source)
    assert len(listing.manifest.val) == 5
    assert listing.omitted["val"].counts == {left_out.NO_LABEL: 1, left_out.NO_IMAGE: 1}
    table = source / "LOC_val_solution.csv"
    assert listing.omitted["val"].examples == {
        left_out.NO_LABEL: f"{image}, which has no line in {table}",
        left_out.NO_IMAGE: f"ILSVRC2012_val_00000002 in {table}",
    }


def test_what_lies_next_to_the_splits_is_counted(source: Path) -> None:
    omitted = index(source).omitted["root"]
    assert omitted.counts == {left_out.BESIDE: 1}
    assert omitted.examples == {left_out.BESIDE: str(source / "ILSVRC/Data/CLS-LOC/test")}


def test_an_unknown_synset_is_named(source: Path) -> None:
    table = source / "LOC_val_solution.csv"
    table.write_text(table.read_text().replace("ILSVRC2012_val_00000002,n02105855", "ILSVRC2012_val_00000002,n9"))
    with pytest.raises(ValueError, match="n9 .*ILSVRC2012_val_00000002.JPEG"):
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
    with pytest.raises(ValueError, match="LOC_val_solution.csv .*PredictionString|/val has no image"):
        index(source)


def test_no_validation_image(source: Path) -> None:
    for image in (source / "ILSVRC/Data/CLS-LOC/val").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="CLS-LOC/val has no image"):
        index(source)
