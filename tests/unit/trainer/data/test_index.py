"""Image lists from class folders: order, cached sizes, and what a wrong folder gets."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.trainer.data import index as data_index
from bitfleet.trainer.data.cache import cache_folder
from bitfleet.trainer.data.manifest import lists_sha

FILES = {"a": ["2.JPEG", "10.jpg", "z.PNG"], "B": ["1.png"]}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))


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
    images = data_index.load_image_list(found := data_index.scan_class_folders(root / "train"))
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
    images = data_index.load_image_list(data_index.scan_class_folders(root / "train"))
    assert os.fsencode(images.path(len(images) - 1)) == name.replace(b"//", b"/")


def test_sizes_are_read_once_and_again_when_a_file_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data_index.load_image_list(data_index.scan_class_folders(root / "train"))
    read = data_index._read_image_sizes
    with monkeypatch.context() as patch:
        patch.setattr(data_index, "_read_image_sizes", lambda paths: pytest.fail("the cache was not used"))
        again = data_index.load_image_list(data_index.scan_class_folders(root / "train"))
    np.testing.assert_array_equal(again.widths, first.widths)

    Image.new("RGB", (99, 20)).save(root / "train/B/1.png")
    assert data_index._read_image_sizes is read
    changed = data_index.load_image_list(data_index.scan_class_folders(root / "train"))
    assert changed.widths[0] == 99


def test_sha_is_of_the_content_not_of_the_place(root: Path, tmp_path: Path) -> None:
    def sha(place: Path) -> str:
        train, val = map(data_index.load_image_list, data_index.scan_root(place))
        return lists_sha(train, val)

    first = sha(root)
    moved = root.rename(tmp_path / "moved")
    assert sha(moved) == first
    (moved / "train/a/2.JPEG").rename(moved / "train/a/3.JPEG")
    assert sha(moved) != first


def test_missing_root_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nowhere' does not exist; expected ROOT/train/<class>/.*bitfleet data prepare"
    ):
        data_index.scan_root(tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split(root: Path, split: str) -> None:
    (root / split).rename(root / "other")
    with pytest.raises(ValueError, match=rf"data' has no folder {split}/; expected"):
        data_index.scan_root(root)


def test_no_class_folder(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="has no class folder in it"):
        data_index.scan_class_folders(tmp_path)


def test_empty_class_folder_is_named(root: Path) -> None:
    (root / "train/c").mkdir()
    (root / "train/c/readme.txt").write_text("")
    with pytest.raises(ValueError, match=r"class folder .*/train/c has no image in it"):
        data_index.scan_root(root)


@pytest.mark.parametrize(("split", "other"), [("train", "val"), ("val", "train")])
def test_different_classes_are_named(root: Path, split: str, other: str) -> None:
    write_images(root / split, {"c": ["1.png"]})
    with pytest.raises(ValueError, match=rf"'c' is in {split}/ only; add it to {other}/ or remove it"):
        data_index.scan_root(root)


def test_broken_header_is_named(root: Path) -> None:
    (root / "train/a/10.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"the image .*/train/a/10\.jpg cannot be read"):
        data_index.load_image_list(data_index.scan_class_folders(root / "train"))


def test_format_that_dali_does_not_read_is_named(root: Path) -> None:
    Image.new("RGB", (4, 4)).save(root / "train/a/10.jpg", format="GIF")
    with pytest.raises(ValueError, match=r"/train/a/10\.jpg cannot be read \(it is a GIF file"):
        data_index.load_image_list(data_index.scan_class_folders(root / "train"))


def test_link_to_nothing_is_named(root: Path) -> None:
    (root / "train/a/4.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(ValueError, match=r"/train/a/4\.jpg is a link to nothing"):
        data_index.scan_class_folders(root / "train")


def test_what_is_no_file_is_named(root: Path) -> None:
    (root / "val/a/loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(ValueError, match=r"a/loop\.jpg is unreadable \(Too many levels of symbolic links\)"):
        data_index.scan_root(root)
    (root / "val/a/loop.jpg").unlink()
    os.mkfifo(root / "val/a/pipe.jpg")
    with pytest.raises(ValueError, match=r"a/pipe\.jpg is not a regular file; remove it"):
        data_index.scan_root(root)


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

    found, _ = data_index.scan_root(root)
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(ValueError, match=r"cache cannot be written \(No space left on device\); make room"):
            data_index.load_image_list(found)
    whole = data_index.load_image_list(found)
    for file in cache_folder().glob("*.npz"):
        file.write_bytes(b"")
    assert data_index.load_image_list(found).heights.tolist() == whole.heights.tolist()
