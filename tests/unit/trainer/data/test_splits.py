"""The two splits: their folders and their classes."""

from pathlib import Path

import pytest

from bitfleet.trainer.data.splits import scan_root, split_folder
from tests.unit.trainer.data.test_class_folders import write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "data", "train/a/1.jpg", "train/B/1.png", "val/a/1.jpg", "val/B/1.png")


def test_missing_root_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nowhere' does not exist; expected ROOT/train/<class>/.*bitfleet data prepare"
    ):
        scan_root(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(root: Path, split: str) -> None:
    (root / split).rename(root / "other")
    with pytest.raises(ValueError, match=rf"data' has no folder {split}/; expected"):
        scan_root(root)


def test_no_class_folder(tmp_path: Path) -> None:
    write(tmp_path, "train/1.jpg", "val/a/1.jpg")
    with pytest.raises(ValueError, match=r"train has no class folder in it"):
        scan_root(tmp_path)


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation", "VAL"])
def test_names_of_the_splits(root: Path, train: str, val: str) -> None:
    (root / "train").rename(root / "t")
    (root / "t").rename(root / train)
    (root / "val").rename(root / "v")
    (root / "v").rename(root / val)
    (root / ("valid" if val != "valid" else "val")).mkdir()  # an empty one is none
    scan = scan_root(root)
    assert (scan.train.folder.name, scan.val.folder.name) == (train, val)
    assert len(scan.val.names) == 2


def test_two_folders_of_a_split(root: Path) -> None:
    write(root, "validation/a/1.jpg")
    with pytest.raises(ValueError, match="has val/ and validation/, each with class folders: remove or rename"):
        split_folder(root, "val")


def test_classes_without_an_image_are_faults(root: Path) -> None:
    write(root / "train", "c/readme.txt", "d/1.jpg", "d/2.jpg")
    (root / "val/c").mkdir()
    empty, empty_val, different = scan_root(root).faults
    assert empty.endswith("train/c has no image in it; fill it or remove it from train/ and val/")
    assert empty_val.endswith("val/c has no image in it; fill it or remove it from train/ and val/")
    assert (
        "4 classes in train/ and 3 in val/, which must be the same: 'd' is in train/ only; add it to val/" in different
    )
    scan = scan_root(root)
    assert scan.val.classes == scan.train.classes == ("B", "a", "c", "d")
    assert scan.val.labels == [0, 1]


def test_labels_of_validation_are_those_of_training(root: Path) -> None:
    write(root, "train/A/1.jpg", "train/b/1.jpg", "val/b/1.jpg")
    assert scan_root(root).val.labels == [1, 2, 3]
    assert scan_root(root).val.names == ["B/1.png", "a/1.jpg", "b/1.jpg"]


def test_a_class_of_validation_alone_has_no_label(root: Path) -> None:
    write(root, "train/c/1.jpg", "val/d/1.jpg")
    with pytest.raises(ValueError, match=r"'d' is in val/ only; add it to train/ or remove it from val/"):
        scan_root(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_image_at_all_says_what_there_is(root: Path, split: str) -> None:
    for name in ("a/1.jpg", "B/1.png"):
        (root / split / name).rename(root / split / f"{name[0]}/.{name[2:]}")
    with pytest.raises(ValueError, match=rf"no class folder of .*/{split} has an image in it \(there are: 2 hidden"):
        scan_root(root)


def test_names_that_look_the_same_are_escaped(root: Path) -> None:
    write(root, "train/caf\u00e9/1.jpg", "val/cafe\u0301/1.jpg")
    with pytest.raises(
        ValueError, match=r"'cafe\\u0301' is in val/ only \(train/ has 'caf\\xe9', which looks the same"
    ):
        scan_root(root)
