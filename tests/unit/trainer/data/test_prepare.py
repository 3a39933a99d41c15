"""One data set in every form gives one stream; what DEST may be; counts that are checked."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitfleet.trainer.data import DataConfig, Dataset, imagenet, open_dataset
from bitfleet.trainer.data.manifest import list_bytes, read_manifest
from bitfleet.trainer.data.prepare import prepare
from bitfleet.trainer.data.unfinished import only_one
from tests.unit.trainer.data import miniature
from tests.unit.trainer.data.miniature import SYNSETS

Make = Callable[[Path], Path]
FORMS = [miniature.archives, miniature.class_folders, miniature.kaggle]


pytestmark = pytest.mark.usefixtures("miniature_counts")


def prepared(source: Path, dest: Path) -> Dataset:
    prepare(source, dest, num_workers=1)
    return open_dataset(DataConfig(root=str(dest)))


@pytest.mark.parametrize("make", FORMS[1:])
def test_the_same_photos_have_the_same_place_and_label_in_every_form(tmp_path: Path, make: Make) -> None:
    archives = prepared(miniature.archives(tmp_path / "archives"), tmp_path / "dest")
    source = make(tmp_path / "source")
    before = miniature.tree(source)
    other = prepared(source, tmp_path / "other")
    assert miniature.tree(source) == before
    assert sorted(os.listdir(tmp_path / "other")) == ["manifest.json", "train.tsv", "val.tsv"]
    assert other.classes == archives.classes == SYNSETS
    assert list_bytes(other.train) == list_bytes(archives.train)
    for ours, theirs in ((archives.train, other.train), (archives.val, other.val)):
        for column in ("labels", "heights", "widths", "sizes"):
            assert np.array_equal(getattr(ours, column), getattr(theirs, column)), column
        assert [ours.read(i) for i in range(len(ours))] == [theirs.read(i) for i in range(len(theirs))]
    assert (other.sha == archives.sha) == (make is miniature.class_folders)  # Kaggle's val/ has other paths


@pytest.mark.parametrize("make", FORMS[1:])
def test_in_place_by_two_workers_and_listed_anew(tmp_path: Path, make: Make) -> None:
    source = make(tmp_path / "source")
    first = prepare(source, source, num_workers=2)
    assert "18 images listed, where they lie" in first
    sha = read_manifest(source)[1]
    assert f"sha256    {sha}" in first
    assert not (source / ".prepare.lock").exists()
    moved = source.rename(tmp_path / "moved")
    assert sha in prepare(moved, moved, num_workers=1)
    assert read_manifest(moved)[0].facts == {"source": str(moved)}
    image = next(moved.rglob("train/n02105855/*.JPEG"))
    image.write_bytes(miniature.photo(2, 99))
    assert sha not in prepare(moved, moved, num_workers=1)


def test_archives_prepared_already(tmp_path: Path) -> None:
    source = miniature.archives(tmp_path / "source")
    first = prepare(source, tmp_path / "dest", num_workers=1).splitlines()
    tree = miniature.tree(tmp_path / "dest")
    again = prepare(source, tmp_path / "dest", num_workers=1).splitlines()
    assert again[0] == f"{tmp_path / 'dest'} is prepared already; nothing was done"
    assert again[1:] == first[1:]
    assert miniature.tree(tmp_path / "dest") == tree
    assert sorted(os.listdir(tmp_path)) == ["dest", "source"]


def test_dest_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    archives, folders = miniature.archives(tmp_path / "archives"), miniature.class_folders(tmp_path / "folders")
    miniature.write(tmp_path / "mine", {"thesis.tex": b"..."})
    (tmp_path / "file").touch()
    prepare(archives, tmp_path / "dest", num_workers=1)
    prepare(folders, tmp_path / "listed", num_workers=1)
    before = miniature.tree(tmp_path)
    for source, dest, message in (
        (archives, "mine", r"mine has something else in it \(thesis\.tex\)"),
        (folders, "mine", r"mine has something else in it \(thesis\.tex\)"),
        (archives, "archives", r"archives has something else in it \(ILSVRC2012"),
        (archives, "file", "file is a file"),
        (
            folders,
            "dest",
            r"is prepared from .*/archives \(ILSVRC2012 archives\), not from .*/folders \(class folders\)",
        ),
        (archives, "listed", r"is prepared from .*/folders"),
        (tmp_path / "dest", "dest", r"is prepared from .*/archives"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(source, tmp_path / dest, num_workers=1)
    assert miniature.tree(tmp_path) == before


def test_an_empty_dest_and_what_an_interrupted_run_left_are_used(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert len(prepared(miniature.archives(tmp_path / "archives"), tmp_path / "a").train) == 12
    miniature.write(tmp_path / "b", {".tmp-train.tsv": b"p", "train.tsv": b"path", ".prepare.lock": b""})
    assert len(prepared(miniature.class_folders(tmp_path / "folders"), tmp_path / "b").train) == 12
    (tmp_path / "b/manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read: remove it"):
        prepare(tmp_path / "folders", tmp_path / "b", num_workers=1)


@pytest.mark.parametrize("make", FORMS[:2])
def test_two_at_once(tmp_path: Path, make: Make) -> None:
    source, dest = make(tmp_path / "source"), tmp_path / "dest"
    lock = tmp_path / "dest.lock" if make is miniature.archives else dest / ".prepare.lock"
    with only_one(lock, dest), pytest.raises(ValueError, match=f"another process is making {dest}: wait"):
        prepare(source, dest, num_workers=1)
    assert not (dest / "manifest.json").exists()
    assert not lock.exists()
    prepare(source, dest, num_workers=1)


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, split: str) -> None:
    source = make(tmp_path / "source")
    less = {"train": 12, "val": 6, "least_train_per_class": 4, "val_per_class": 2} | {split: 99}
    monkeypatch.setattr(imagenet, "ILSVRC2012", imagenet.Counts(**less))
    number = f"{12 if split == 'train' else 6} {'training' if split == 'train' else 'validation'} images"
    with pytest.raises(ValueError, match=f"has {number}: ILSVRC2012 has 99. Complete it, or .* --allow_incomplete"):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest/manifest.json").exists()
    summary = prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)
    fault = f"{source} has {number}: ILSVRC2012 has 99"
    assert f"\nINCOMPLETE: {fault}\n" in summary
    assert read_manifest(tmp_path / "dest")[0].facts["incomplete"] == [fault]


def test_the_first_class_that_is_short_is_named(tmp_path: Path) -> None:
    source = miniature.class_folders(tmp_path / "source")
    next((source / "train/n01443537").iterdir()).unlink()
    with pytest.raises(ValueError, match="11 training .* has 12; the class n01443537 has 3, expected 4 or more"):
        prepare(source, source, num_workers=1)


def test_other_classes_are_what_the_source_says(tmp_path: Path) -> None:
    source = miniature.class_folders(tmp_path / "source")
    for split in ("train", "val"):
        (source / split / "n01443537").rename(source / split / "cats")
    assert prepared(source, tmp_path / "dest").classes == ("cats", "n01440764", "n02105855")
    (source / "val/cats").rename(source / "val/dogs")
    for allow_incomplete in (False, True):  # a class that training does not have has no label
        with pytest.raises(ValueError, match="must be the same: 'dogs' is in val/ only; add it to train/ or remove it"):
            prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=allow_incomplete)


def test_kaggle_has_the_classes_of_imagenet(tmp_path: Path) -> None:
    source = miniature.kaggle(tmp_path / "source")
    table = source / "LOC_val_solution.csv"
    table.write_text(table.read_text().replace("n02105855", "n9"))
    (source / "ILSVRC/Data/CLS-LOC/train/n02105855").rename(source / "ILSVRC/Data/CLS-LOC/train/n9")
    with pytest.raises(ValueError, match="has 3 classes and not the 3 of ILSVRC2012: n02105855 is missing"):
        prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)
