"""Scans of class folders: what ImageFolder sees, in its order, and everything else counted."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.scan import is_tiny_imagenet, scan_class_folders, scan_root, split_folder
from tests import miniature

PHOTO = miniature.photo(0, 1)


def write(root: Path, *names: str) -> Path:
    """Write a photo to each name, another text to those that end in .txt."""
    return miniature.write(root, {name: b"text" if name.endswith(".txt") else PHOTO for name in names})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "data", "train/a/1.jpg", "train/B/1.png", "val/a/1.jpg", "val/B/1.png")


def counts(root: Path) -> Mapping[str, int]:
    return scan_class_folders(root / "train").omitted.counts


def test_images_at_any_depth_in_the_order_of_image_folder(root: Path) -> None:
    names = ["z.JPEG", "s/2.jpg", "s/10.jpg", "s-1/0.jpg", "s/t/0.png", "A/0.bmp", "x.jpg/1.webp", "é/1.tif", "0.ppm"]
    write(root / "train/a", *names)
    found = scan_class_folders(root / "train")
    theirs = ImageFolder(str(root / "train"))
    assert list(found.classes) == theirs.classes
    samples = [(os.path.relpath(path, root / "train"), label) for path, label in theirs.samples]
    assert list(zip(found.names, found.labels, strict=True)) == samples
    assert len(samples) == 11
    assert found.omitted.counts == {}


def test_every_suffix_and_content_of_an_image(root: Path) -> None:
    forms = {
        "1.JPG": "JPEG",
        "2.jfif": "JPEG",
        "3.jpe": "JPEG",
        "4.pgm": "PPM",
        "5": "JPEG",
        "6.jpg_large": "JPEG",
        "7.jp2": "JPEG2000",
        "8.img": "PNG",
        "9.001": "BMP",
        "photo of 12.3.2011": "WEBP",
        "b.data": "TIFF",
        "c.PBM": "PPM",
        "d.x": "PPM",
        "e.J2K": "JPEG2000",
        "f.y": "JPEG2000",
        "g.gif": "JPEG",
    }
    for name, form in forms.items():
        image = Image.new("1" if name == "c.PBM" else "RGB", (9, 9))
        options = {"no_jp2": True} if name in ("e.J2K", "f.y") else {}
        image.save(root / "train/a" / name, format=form, **options)
    found = scan_class_folders(root / "train")
    assert {name.removeprefix("a/") for name in found.names if name.startswith("a/")} == {*forms, "1.jpg"}
    assert found.omitted.counts == {}


def test_content_is_looked_at_only_where_the_suffix_says_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "train/a", "2.jpg", "labels.txt", "3.PNG", ".DS_Store")
    monkeypatch.setattr("builtins.open", lambda *arguments, **options: pytest.fail(f"opened {arguments}"))
    assert len(scan_class_folders(root / "train").names) == 4


def test_what_is_not_listed_is_counted_by_reason(root: Path) -> None:
    folder = root / "train/a"
    Image.new("P", (9, 9)).save(folder / "1.gif")
    Image.new("P", (9, 9)).save(folder / "2.GIF")
    miniature.write(folder, {"x.npy": b"\x93NUMPY", "BMW": b"BM but no picture", "P1": b"P1 is a road", "empty": b""})
    write(folder, "notes.txt", "deep/labels.txt", ".1.jpg", ".trash/2.jpg", ".trash/c/3.jpg", "._1.jpg", ".DS_Store")
    write(folder, "Thumbs.db", "deep/desktop.ini", "__MACOSX/._9.jpg", "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", ".git/x")
    write(root / "train", "flat.jpg", "flat", "README.txt", "__MACOSX/a/._1.jpg")
    (folder / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # the address of a socket has at most 108 bytes
        listener.bind("socket")
        os.chdir(here)
    (folder / "up").symlink_to("..")
    (root / "train/me").symlink_to("../train")
    assert counts(root) == {
        left_out.OUTSIDE: 2,
        left_out.TEXT: 3,
        left_out.SYSTEM: 8,
        left_out.HIDDEN: 3,
        left_out.LOOP: 2,
        left_out.DANGLING: 1,
        left_out.IRREGULAR: 2,
        "files named *.gif, not images that are read": 2,
        "files named *.npy, not images that are read": 1,
        "files without a suffix, not images": 3,
    }
    assert scan_class_folders(root / "train").names == ["B/1.png", "a/1.jpg"]


def test_many_suffixes_are_counted_together(root: Path) -> None:
    miniature.write(root / "train/a", {f"{i}.{i:04d}": b"?" for i in range(30)})
    assert sum(counts(root).values()) == 30
    assert len(counts(root)) == 11


def test_links_to_folders_are_followed_and_never_for_ever(root: Path, tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/1.jpg", "elsewhere/c/2.jpg", "other/3.jpg")
    (root / "train/c").symlink_to(tmp_path / "elsewhere")
    (root / "train/a/more").symlink_to(tmp_path / "other")
    (root / "train/a/2.jpg").symlink_to(tmp_path / "other/3.jpg")
    (tmp_path / "other/back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "other")
    (root / "train/a/self").symlink_to("self")
    found = scan_class_folders(root / "train")
    assert found.classes == ("B", "a", "c")
    assert found.names == [
        "B/1.png",
        *("a/1.jpg", "a/2.jpg", "a/more/3.jpg", "a/more/back/1.jpg", "a/more/back/c/2.jpg"),
        *("c/1.jpg", "c/again/3.jpg", "c/c/2.jpg"),
    ]
    assert found.omitted.counts == {left_out.LOOP: 2, left_out.DANGLING: 1}


def test_a_folder_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "train/a/closed/1.jpg")
    scandir = os.scandir

    def closed(path: str | Path) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    scan = scan_root(root)
    assert scan.unread == {f"{root}/train/a/closed": "the folder cannot be read (Permission denied)"}


def test_names_that_no_list_can_hold_are_all_named(root: Path) -> None:
    write(root, "train/a/x\ty.jpg", "train/a/d\n/y.jpg", "train/c\r/1.jpg", "val/c\r/1.jpg", "train/a/notes\t.txt")
    assert sorted(scan_root(root).unread) == sorted(
        f"{root}/{name}" for name in ("train/a/x\ty.jpg", "train/a/d\n/y.jpg", "train/c\r", "val/c\r")
    )


def test_missing_root_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist.* ROOT/train/<class>/.*bitfleet data prepare"):
        scan_root(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(root: Path, split: str) -> None:
    (root / split).rename(root / "other")
    with pytest.raises(ValueError, match=rf"data' .* {split}/"):
        scan_root(root)


def test_no_class_folder(tmp_path: Path) -> None:
    write(tmp_path, "train/1.jpg", "val/a/1.jpg")
    with pytest.raises(ValueError, match=r"/train .*no class folder"):
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
    with pytest.raises(ValueError, match="val/ and validation/"):
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
    with pytest.raises(ValueError, match=r"'d' .* val/ .* train/"):
        scan_root(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_image_at_all_says_what_there_is(root: Path, split: str) -> None:
    for name in ("a/1.jpg", "B/1.png"):
        (root / split / name).rename(root / split / f"{name[0]}/.{name[2:]}")
    with pytest.raises(ValueError, match=rf"/{split} .*2 hidden"):
        scan_root(root)


def test_names_that_look_the_same_are_escaped(root: Path) -> None:
    write(root, "train/caf\u00e9/1.jpg", "val/cafe\u0301/1.jpg")
    with pytest.raises(ValueError, match=r"'cafe\\u0301' .* val/ .*train/ .*'caf\\xe9'"):
        scan_root(root)


TINY = ["train/n1/images/n1_0.JPEG", "train/n1/images/n1_1.JPEG", "train/n2/images/n2_0.JPEG"]


def tiny(root: Path, table: str) -> Path:
    write(root, *TINY, "train/n1/n1_boxes.txt", *(f"val/images/val_{i}.JPEG" for i in range(3)))
    (root / "val/val_annotations.txt").write_text(table)
    return root


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tiny(tmp_path, "val_0.JPEG\tn2\t0\t0\t1\t1\nval_1.JPEG\tn1\t0\t0\t1\t1\nval_2.JPEG\tn2\t0\t0\t1\t1\n")
    assert is_tiny_imagenet(root / "val")
    scan = scan_root(root)
    assert scan.train.names == [name.removeprefix("train/") for name in TINY]
    assert scan.val.names == ["images/val_1.JPEG", "images/val_0.JPEG", "images/val_2.JPEG"]
    assert scan.val.labels == [0, 1, 1]
    assert scan.faults == ()
    assert scan.val.omitted.counts == {}
    assert scan.train.omitted.counts == {left_out.TEXT: 1}


def test_tiny_imagenet_in_part(tmp_path: Path) -> None:
    scan = scan_root(tiny(tmp_path, "val_0.JPEG\tn2\nval_1.JPEG\tn3\nval_9.JPEG\tn1\n"))
    assert scan.val.names == ["images/val_0.JPEG"]
    assert scan.val.omitted.counts == {left_out.NO_CLASS: 1, left_out.NO_LABEL: 1, left_out.NO_IMAGE: 1}
    assert scan.faults == (f"{tmp_path}/val/val_annotations.txt names no image of the class 'n1'",)
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG n2\n")
    with pytest.raises(ValueError, match="line 1 of .*val_annotations.txt .*'val_0.JPEG n2'"):
        scan_root(tmp_path)


def test_tiny_imagenet_sorted_into_classes_is_class_folders(tmp_path: Path) -> None:
    write(tmp_path, *TINY, "val/n1/images/1.JPEG", "val/n2/images/2.JPEG", "val/val_annotations.txt")
    assert not is_tiny_imagenet(tmp_path / "val")
    assert scan_root(tmp_path).val.names == ["n1/images/1.JPEG", "n2/images/2.JPEG"]
