"""One data set in every form gives one stream; what DEST may be; counts that are checked."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bitfleet.launch.data import imagenet
from bitfleet.launch.data.prepare import prepare
from bitfleet.launch.data.unfinished import lock_dest
from bitfleet.trainer.data import DataConfig, Dataset, left_out, open_dataset
from bitfleet.trainer.data.image_list import list_bytes, read_manifest, read_quarantine
from tests import miniature
from tests.miniature import SYNSETS

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
    test_images = {"left_out": {"root": {left_out.BESIDE: 1}}} if make is miniature.kaggle else {}
    assert read_manifest(moved)[0].facts == {"source": str(moved), **test_images}
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
    with pytest.raises(ValueError, match=r"manifest\.json .*remove"):
        prepare(tmp_path / "folders", tmp_path / "b", num_workers=1)


@pytest.mark.parametrize("make", FORMS[:2])
def test_two_at_once(tmp_path: Path, make: Make) -> None:
    source, dest = make(tmp_path / "source"), tmp_path / "dest"
    lock = tmp_path / "dest.lock" if make is miniature.archives else dest / ".prepare.lock"
    with lock_dest(lock, dest), pytest.raises(ValueError, match=f"another process .*{dest}"):
        prepare(source, dest, num_workers=1)
    assert not (dest / "manifest.json").exists()
    assert not lock.exists()
    prepare(source, dest, num_workers=1)


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, split: str) -> None:
    source = make(tmp_path / "source")
    less = {"train": 12, "val": 6, "least_train_per_class": 4, "val_per_class": 2} | {split: 99}
    monkeypatch.setattr(imagenet, "ILSVRC2012", imagenet.Counts(name="ILSVRC2012", **less))
    number = f"{12 if split == 'train' else 6} {'training' if split == 'train' else 'validation'} images"
    with pytest.raises(ValueError, match=f"{number}: ILSVRC2012 has 99.* --allow_incomplete"):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest/manifest.json").exists()
    summary = prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)
    fault = f"{source} has {number}: ILSVRC2012 has 99"
    assert f"\nINCOMPLETE: {fault}\n" in summary
    assert read_manifest(tmp_path / "dest")[0].facts["incomplete"] == [fault]


def test_the_first_class_that_is_short_is_named(tmp_path: Path) -> None:
    source = miniature.class_folders(tmp_path / "source")
    next((source / "train/n01443537").iterdir()).unlink()
    with pytest.raises(ValueError, match="11 training .* has 12; .* n01443537 has 3, .* 4 "):
        prepare(source, source, num_workers=1)


def test_other_classes_are_what_the_source_says(tmp_path: Path) -> None:
    source = miniature.class_folders(tmp_path / "source")
    for split in ("train", "val"):
        (source / split / "n01443537").rename(source / split / "cats")
    assert prepared(source, tmp_path / "dest").classes == ("cats", "n01440764", "n02105855")
    (source / "val/cats").rename(source / "val/dogs")
    for allow_incomplete in (False, True):  # a class that training does not have has no label
        with pytest.raises(ValueError, match="'dogs' .* val/ .* train/"):
            prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=allow_incomplete)


def test_kaggle_has_the_classes_of_imagenet(tmp_path: Path) -> None:
    source = miniature.kaggle(tmp_path / "source")
    table = source / "LOC_val_solution.csv"
    table.write_text(table.read_text().replace("n02105855", "n9"))
    (source / "ILSVRC/Data/CLS-LOC/train/n02105855").rename(source / "ILSVRC/Data/CLS-LOC/train/n9")
    with pytest.raises(ValueError, match="3 classes .* 3 of ILSVRC2012: n02105855"):
        prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)


BAD = {"train/n01440764/n01440764_1.JPEG": b"", "train/n02105855/n02105855_2.JPEG": b"<html>"}


def test_all_unreadable_images_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = miniature.write(miniature.class_folders(tmp_path / "source"), BAD)
    (source / "val/n02105855/gone.jpg").symlink_to("nowhere")
    with pytest.raises(ValueError, match="3 images .* --on_bad_sample quarantine") as error:
        prepare(source, tmp_path / "dest", num_workers=2, allow_incomplete=True)
    for name, reason in zip(BAD, ("the file is empty", "it is not an image"), strict=True):
        assert f"{source}/{name} ({reason})" in str(error.value)
    assert f"{source}/val/n02105855/gone.jpg (a link to nothing)" in str(error.value)
    assert "ILSVRC2012 has 6" not in str(error.value)  # that is allowed
    with pytest.raises(ValueError, match="a link to nothing.*7 validation images: ILSVRC2012 has 6"):
        prepare(source, tmp_path / "dest", num_workers=1)
    assert not (tmp_path / "dest/manifest.json").exists()
    many = {f"train/n02105855/{i:02d}.jpg": b"?" for i in range(30)}
    with pytest.raises(ValueError, match="33 images .* 13 more"):
        prepare(miniature.write(source, many), tmp_path / "dest", num_workers=1, allow_incomplete=True)
    assert capsys.readouterr().err.count("unreadable: ") == 33


def test_unreadable_images_are_set_aside_and_come_back(tmp_path: Path) -> None:
    source = miniature.write(miniature.class_folders(tmp_path / "source"), BAD)
    before = miniature.tree(source)
    summary = prepare(source, tmp_path / "dest", num_workers=1, quarantine=True)
    assert "SET ASIDE: 2 images" in summary
    assert str(tmp_path / "dest/quarantine.tsv") in summary
    assert miniature.tree(source) == before
    assert read_quarantine(tmp_path / "dest") == dict(
        zip(BAD, ("the file is empty", "it is not an image"), strict=True)
    )
    assert len(read_manifest(tmp_path / "dest")[0].train) == 12  # nothing is lost
    dataset = open_dataset(DataConfig(root=str(tmp_path / "dest")))
    assert (len(dataset.train), dataset.num_quarantined) == (10, 2)
    assert "2 that bitfleet data verify or prepare set aside are LEFT OUT" in dataset.summary()
    (tmp_path / "dest/quarantine.tsv").unlink()
    assert len(open_dataset(DataConfig(root=str(tmp_path / "dest"))).train) == 10  # they have no size

    whole = miniature.extracted()
    miniature.write(source, {name: whole[name] for name in BAD})
    prepare(source, tmp_path / "dest", num_workers=1)
    assert len(open_dataset(DataConfig(root=str(tmp_path / "dest"))).train) == 12


def test_shards_with_unreadable_images(tmp_path: Path) -> None:
    source = miniature.shards(tmp_path / "source")
    files = miniature.tar_files(source / "val/0.tar")
    bad = [name for name in files if name.endswith(".jpg")][1:3]
    (source / "val/0.tar").write_bytes(miniature.tar(files | dict.fromkeys(bad, b"<html>")))
    with pytest.raises(ValueError, match=rf"2 images .*val/0\.tar/{bad[0]} \(.*{bad[1]}"):
        prepare(source, source, num_workers=1)
    prepare(source, source, num_workers=1, quarantine=True)
    assert list(read_quarantine(source)) == sorted(f"val/0.tar/{name}" for name in bad)
    assert len(open_dataset(DataConfig(root=str(source))).val) == 4


def test_what_is_left_out_is_said_and_too_much_is_an_error(tmp_path: Path) -> None:
    source = miniature.class_folders(tmp_path / "source")
    miniature.write(source, {"train/n01440764/notes.txt": b"", "test/1.jpg": b"", "README.md": b""})
    said = "left out  train: 1 text or annotations\nleft out  root: 1 other files or folders\n"
    assert said in prepare(source, tmp_path / "dest", num_workers=1)
    assert read_manifest(tmp_path / "dest")[0].facts["left_out"] == {
        "train": {"text or annotations": 1},
        "root": {"other files or folders": 1},
    }
    miniature.write(source, {"train/n01440764/a.npy": b"", "val/n01440764/.1.jpg": b""})
    with pytest.raises(ValueError, match=r" train .* 12 images .* 1 files named \*\.npy.* val .*hidden"):
        prepare(source, tmp_path / "dest", num_workers=1)
    summary = prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)
    assert "INCOMPLETE: not listed from train in" in summary
    assert "INCOMPLETE: not listed from val in" in summary
    notes = open_dataset(DataConfig(root=str(tmp_path / "dest"))).summary()
    assert "not listed: train: 1 files named *.npy, not images that are read, 1 text or annotations;" in notes


def test_a_class_without_validation_images(tmp_path: Path) -> None:
    source = miniature.class_folders(tmp_path / "source")
    (source / "val/n01443537").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="'n01443537' .* train/ .*--allow_incomplete"):
        prepare(source, tmp_path / "dest", num_workers=1)
    prepare(source, tmp_path / "dest", num_workers=1, allow_incomplete=True)
    dataset = open_dataset(DataConfig(root=str(tmp_path / "dest")))
    assert dataset.classes == SYNSETS
    assert set(dataset.val.labels.tolist()) == {0, 2}


def test_classes_that_look_the_same_are_said(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for split in ("train", "val"):
        for name in ("Cat", "cat", "caf\u00e9", "cafe\u0301"):
            miniature.write(source, {f"{split}/{name}/1.jpg": miniature.photo(0, 1)})
    summary = prepare(source, source, num_workers=1)
    assert "NOTE: classes whose names look the same: 'cafe\\u0301' and 'caf\\xe9'" in summary
    assert "NOTE: classes whose names differ in upper and lower case alone: 'Cat' and 'cat'" in summary


def test_tiny_imagenet(tmp_path: Path) -> None:
    source = tmp_path / "source"
    miniature.write(source, {f"train/n{i}/images/n{i}_{k}.JPEG": miniature.photo(i, k) for i in (0, 1) for k in (0, 1)})
    miniature.write(source, {f"val/images/val_{i}.JPEG": miniature.photo(i, 5) for i in (0, 1)})
    miniature.write(
        source, {"val/val_annotations.txt": b"val_0.JPEG\tn0\t0\nval_1.JPEG\tn1\t0\n", "wnids.txt": b"n0\nn1\n"}
    )
    miniature.write(source, {"test/images/test_0.JPEG": miniature.photo(0, 1)})
    summary = prepare(source, tmp_path / "dest", num_workers=1)
    assert "\nlayout    Tiny ImageNet\n" in summary
    prepared_one, plain = (open_dataset(DataConfig(root=str(root))) for root in (tmp_path / "dest", source))
    assert prepared_one.sha == plain.sha
    assert plain.classes == ("n0", "n1")
    assert [plain.val.name(i) for i in range(2)] == ["val/images/val_0.JPEG", "val/images/val_1.JPEG"]
