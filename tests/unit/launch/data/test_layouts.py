"""Recognize the layout of a folder; none, half of one, or two are refused in a sentence."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitfleet.launch.data.archives import DEVKIT_FILE, TRAIN_FILE, VAL_FILE
from bitfleet.launch.data.layouts import recognise
from tests import miniature


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (miniature.archives, "ILSVRC2012 archives"),
        (miniature.class_folders, "class folders"),
        (miniature.kaggle, "Kaggle ILSVRC"),
        (miniature.shards, "WebDataset shards"),
    ],
)
def test_known_forms(tmp_path: Path, make: Callable[[Path], Path], layout: str) -> None:
    assert recognise(make(tmp_path)).layout == layout


@pytest.mark.parametrize("place", ["cifar-10-python.tar.gz", "cifar-10-batches-py/test_batch"])
def test_cifar(tmp_path: Path, place: str) -> None:
    miniature.write(tmp_path, {place: b""})
    assert recognise(tmp_path).layout == "CIFAR-10"
    assert recognise(tmp_path / place.split("/")[0]).layout == "CIFAR-10"


def test_ilsvrc_itself(tmp_path: Path) -> None:
    assert recognise(miniature.kaggle(tmp_path) / "ILSVRC").layout == "Kaggle ILSVRC"


@pytest.mark.parametrize("train", ["train-0.tar", "x_train_00.tar", "imagenet1k-train-0000.tar", "train/0.tar"])
@pytest.mark.parametrize("val", ["val-0.tar", "imagenet1k-validation-00.tar", "val/0.tar"])
def test_names_of_shards(tmp_path: Path, train: str, val: str) -> None:
    miniature.write(tmp_path, {train: b"", val: b""})
    assert recognise(tmp_path).make.args[1:] == ([train], [val])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [],
            "it is empty.*ILSVRC2012_img_train.tar.*cifar.*CLS-LOC.*WebDataset",
        ),
        (
            ["restraint-0.tar", "value-0.tar", "a.jpg"],
            "unpack restraint-0.tar, value-0.tar",
        ),
        (["train.zip", "val.zip", "x.csv"], "unpack train.zip, val.zip"),
        (["a.jpg", "b/c.jpg"], r"\(there is a.jpg, b\)"),
        (list("abcdefgh"), r" a, b, c, d, e, \.\.\."),
        (["x/train/a/1.png", "x/val/a/1.png"], "/x has one .class folders."),
        (["train/a/1.png", "test/a/1.png"], "val/ is missing .*test/"),
        ([TRAIN_FILE], f"there is {TRAIN_FILE}, and {VAL_FILE}, {DEVKIT_FILE} is missing"),
        ([TRAIN_FILE, VAL_FILE], f"there is {TRAIN_FILE}, {VAL_FILE}, and {DEVKIT_FILE} is missing"),
        (["train/a/1.png"], "train/, .* val/ is missing"),
        (["train/a/1.png", "val/1.png"], "val/ .*no class folder.*LOC_val_solution.csv"),
        (["val/a/1.png", "train/.ipynb/1.png"], "val/, .* train/ has no class folder"),
        (["ILSVRC/Data/CLS-LOC/train/n1/1.JPEG"], "has no folder val/"),
        (
            ["ILSVRC/Data/CLS-LOC/train/n1/1.JPEG", "ILSVRC/Data/CLS-LOC/val/1.JPEG"],
            "LOC_val_solution.csv, which has the labels of val/, is missing in .*/ILSVRC and",
        ),
        (["train-0.tar"], r"shards of train \(train-0.tar\), and none of val"),
        (["val/0.tar", "train/a/1.png"], "train/, but .*shards of val .* none of train"),
        (["train-val-0.tar"], "the shard train-val-0.tar says train and val"),
    ],
)
def test_none_or_in_part(tmp_path: Path, files: list[str], message: str) -> None:
    miniature.write(tmp_path, dict.fromkeys(files, b""))
    with pytest.raises(ValueError, match=message):
        recognise(tmp_path)


def test_several(tmp_path: Path) -> None:
    miniature.archives(tmp_path)
    miniature.class_folders(tmp_path)
    with pytest.raises(ValueError, match=r"\(ILSVRC2012 archives, class folders\)"):
        recognise(tmp_path)


def test_a_whole_form_beside_a_part_of_another(tmp_path: Path) -> None:
    miniature.class_folders(tmp_path)
    (tmp_path / VAL_FILE).touch()
    assert recognise(tmp_path).layout == "class folders"


def deny(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, where: Callable[[Path], bool]) -> None:
    """Let a function of the file system fail for some paths, as for another user."""
    original = getattr(owner, name)

    def closed(path: Path) -> Any:
        if where(Path(path)):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(owner, name, closed)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature.class_folders(tmp_path)
    deny(monkeypatch, os, "listdir", lambda path: path.name == "train")
    with pytest.raises(ValueError, match=f"Permission denied: {tmp_path}/train"):
        recognise(tmp_path)


def test_folders_that_may_not_be_read_next_to_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miniature.class_folders(tmp_path / "pictures")
    (tmp_path / "lost+found").mkdir()
    deny(monkeypatch, Path, "is_file", lambda path: path.parent.name == "lost+found")
    with pytest.raises(ValueError, match=r"pictures has one \(class folders\): give that"):
        recognise(tmp_path)


def test_a_folder_whose_parent_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch, Path, "exists", lambda path: True)
    with pytest.raises(ValueError, match=f"SOURCE {tmp_path} cannot be read .Permission denied"):
        recognise(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        recognise(tmp_path / "nowhere")
    (tmp_path / TRAIN_FILE).touch()
    with pytest.raises(ValueError, match=f"{TRAIN_FILE} is a file"):
        recognise(tmp_path / TRAIN_FILE)
