"""The start of a run on class folders that were never prepared."""

from pathlib import Path

import pytest

from bitfleet.trainer.data import DataConfig, open_dataset
from tests import miniature


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return miniature.class_folders(tmp_path / "data")


def test_whole_class_folders_say_nothing_more(root: Path) -> None:
    dataset = open_dataset(DataConfig(root=str(root)))
    assert dataset.summary() == f"12 training and 6 validation images of 3 classes in {root}"


def test_what_is_left_out_is_said(root: Path) -> None:
    miniature.write(root, {"train/n01440764/notes.txt": b"", "val/.DS_Store": b"", "test/1.jpg": b""})
    said = open_dataset(DataConfig(root=str(root))).summary()
    assert "; not listed: train: 1 text or annotations; val: 1 files of a system" in said
    assert said.endswith("; root: 1 other files or folders")


def test_too_much_left_out_is_an_error_unless_allowed(root: Path) -> None:
    (root / "val/n01443537").rename(root / "val/.n01443537")
    with pytest.raises(
        ValueError,
        match=r"'n01443537'.* train/ .*/val: .*1% .*4 images .*2 hidden.*"
        r"--data\.allow_incomplete True",
    ):
        open_dataset(DataConfig(root=str(root)))
    dataset = open_dataset(DataConfig(root=str(root), allow_incomplete=True))
    assert (len(dataset.train), len(dataset.val)) == (12, 4)
    assert set(dataset.val.labels.tolist()) == {0, 2}
    assert "INCOMPLETE: not listed from" in dataset.summary()


def test_all_that_cannot_be_read_are_named(root: Path) -> None:
    bad = [f"train/n01440764/{i}.jpg" for i in range(22)] + ["val/n01440764/1.jpg"]
    miniature.write(root, dict.fromkeys(bad, b"<html>"))
    with pytest.raises(ValueError, match=rf"23 images .*{root}/{bad[0]} .*3 more "):
        open_dataset(DataConfig(root=str(root), allow_incomplete=True))


def test_validation_beside_train(root: Path) -> None:
    (root / "val").rename(root / "validation")
    assert open_dataset(DataConfig(root=str(root))).val.name(0).startswith("validation/n01440764/")
