"""Image lists from class folders: order, cached sizes, and what a wrong folder gets."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.trainer.data import class_folders
from bitfleet.trainer.data import index as data_index
from bitfleet.trainer.data.cache import cache_folder
from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.manifest import lists_sha
from bitfleet.trainer.data.splits import scan_root

FILES = {"a": ["2.JPEG", "10.jpg", "z.PNG"], "B": ["1.png"]}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))


def listed(found: class_folders.ClassFolders) -> ImageList:
    """The images of a scan, all of which can be read."""
    images, reasons = data_index.load_image_list(found)
    assert not reasons
    return images


def write_images(folder: Path, files: Mapping[str, list[str]]) -> None:
    for class_name, names in files.items():
        (folder / class_name).mkdir(parents=True)
        for index, name in enumerate(names):
            Image.new("RGB", (10 + index, 20)).save(folder / class_name / name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        write_images(tmp_path / "data" / split, FILES)
    return tmp_path / "data"


def test_classes_and_files_are_sorted_bytewise(root: Path) -> None:
    (root / "train/a/notes.txt").write_text("not an image")
    (root / "train/a/._10.jpg").write_text("not an image")
    (root / "train/.ipynb_checkpoints").mkdir()
    images = listed(found := class_folders.scan_class_folders(root / "train"))
    assert found.classes == ("B", "a")
    assert [os.path.relpath(images.path(i), root) for i in range(len(images))] == [
        "train/B/1.png",
        "train/a/10.jpg",
        "train/a/2.JPEG",
        "train/a/z.PNG",
    ]
    assert images.labels.tolist() == [0, 1, 1, 1]
    assert images.heights.tolist() == [20] * 4
    assert images.widths.tolist() == [10, 11, 10, 12]


def test_names_that_are_not_utf8(root: Path) -> None:
    name = os.fsencode(root / "train/a/") + b"/\xff.png"
    Image.new("RGB", (5, 5)).save(root / "train/a/x.png")
    os.rename(root / "train/a/x.png", name)
    images = listed(class_folders.scan_class_folders(root / "train"))
    assert os.fsencode(images.path(len(images) - 1)) == name.replace(b"//", b"/")


def test_sizes_are_read_once_and_again_when_a_file_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = listed(class_folders.scan_class_folders(root / "train"))
    read = data_index._read_image_sizes
    with monkeypatch.context() as patch:
        patch.setattr(data_index, "_read_image_sizes", lambda paths: pytest.fail("the cache was not used"))
        again = listed(class_folders.scan_class_folders(root / "train"))
    np.testing.assert_array_equal(again.widths, first.widths)

    Image.new("RGB", (99, 20)).save(root / "train/B/1.png")
    assert data_index._read_image_sizes is read
    changed = listed(class_folders.scan_class_folders(root / "train"))
    assert changed.widths[0] == 99


def test_sha_is_of_the_content_not_of_the_place(root: Path, tmp_path: Path) -> None:
    def sha(place: Path) -> str:
        scan = scan_root(place)
        return lists_sha(listed(scan.train), listed(scan.val))

    first = sha(root)
    moved = root.rename(tmp_path / "moved")
    assert sha(moved) == first
    (moved / "train/a/2.JPEG").rename(moved / "train/a/3.JPEG")
    assert sha(moved) != first


def test_all_that_cannot_be_read_are_named_with_the_reason(root: Path) -> None:
    (root / "train/a/10.jpg").write_text("<html>404</html>")
    (root / "train/a/2.JPEG").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(root / "train/a/3.jpg", format="GIF")
    Image.new("F", (4, 4)).save(root / "train/a/3.pgm", format="PPM")
    (root / "train/a/4.jpg").symlink_to("nowhere.jpg")
    (root / "train/a/5.jpg").symlink_to("5.jpg")
    found = class_folders.scan_class_folders(root / "train")
    for _ in range(2):  # nothing of a failure is kept
        images, reasons = data_index.load_image_list(found)
        assert {os.path.relpath(path, root / "train/a"): reason for path, reason in reasons.items()} == {
            "10.jpg": "it is not an image",
            "2.JPEG": "the file is empty",
            "3.jpg": "it is a GIF file, which bitfleet does not read",
            "3.pgm": "it is a PFM file, which bitfleet does not read",
            "4.jpg": "a link to nothing",
            "5.jpg": "Too many levels of symbolic links",
        }
        assert images.heights.tolist() == [20, 0, 0, 0, 0, 0, 0, 20]


def test_the_sentence_names_twenty_and_counts_the_rest() -> None:
    one = data_index.unreadable_images({"a.jpg": "empty"}, "replace it")
    assert one == "the image a.jpg cannot be read (empty); replace it"
    many = data_index.unreadable_images({f"{i}.jpg": "empty" for i in range(22)}, "replace them", ", listed")
    assert many.startswith("22 images cannot be read; replace them: 0.jpg (empty); 1.jpg (empty)")
    assert many.endswith("19.jpg (empty); and 2 more, listed")
    assert "more" not in data_index.unreadable_images({f"{i}.jpg": "" for i in range(20)}, "replace them")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("BITFLEET_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "bitfleet"
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="set BITFLEET_CACHE to a folder that you can write to"):
        cache_folder()


def test_a_full_cache_is_named_and_written_later(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, **arrays: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = scan_root(root).train
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(ValueError, match=r"cache cannot be written \(No space left on device\); make room"):
            data_index.load_image_list(found)
    whole = listed(found)
    for file in cache_folder().glob("*.npz"):
        file.write_bytes(b"")
    assert listed(found).heights.tolist() == whole.heights.tolist()
