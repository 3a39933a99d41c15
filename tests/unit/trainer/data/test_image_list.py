"""Image lists: from scans, whose headers are cached, and from manifests."""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.launch.data.manifest import write_manifest, write_quarantine
from bitfleet.launch.data.source import merge
from bitfleet.trainer.data import DataConfig, image_list, open_dataset, scan
from bitfleet.trainer.data.cache import cache_folder
from bitfleet.trainer.data.image_list import (
    FILE,
    ImageList,
    Manifest,
    list_bytes,
    read_manifest,
    read_quarantine,
    sha_of,
    shard_and_member,
)
from bitfleet.trainer.data.scan import scan_root

FILES = {"a": ["2.JPEG", "10.jpg", "z.PNG"], "B": ["1.png"]}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))


def listed(found: scan.ClassFolders) -> ImageList:
    """The images of a scan, all of which can be read."""
    images, reasons = image_list.list_scanned(found)
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
    images = listed(found := scan.scan_class_folders(root / "train"))
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
    images = listed(scan.scan_class_folders(root / "train"))
    assert os.fsencode(images.path(len(images) - 1)) == name.replace(b"//", b"/")


def test_sizes_are_read_once_and_again_when_a_file_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = listed(scan.scan_class_folders(root / "train"))
    read = image_list.read_shapes
    with monkeypatch.context() as patch:
        patch.setattr(image_list, "read_shapes", lambda paths: pytest.fail("the cache was not used"))
        again = listed(scan.scan_class_folders(root / "train"))
    np.testing.assert_array_equal(again.widths, first.widths)

    Image.new("RGB", (99, 20)).save(root / "train/B/1.png")
    assert image_list.read_shapes is read
    changed = listed(scan.scan_class_folders(root / "train"))
    assert changed.widths[0] == 99


def test_sha_is_of_the_content_not_of_the_place(root: Path, tmp_path: Path) -> None:
    def sha(place: Path) -> str:
        scan = scan_root(place)
        return sha_of([list_bytes(listed(scan.train)), list_bytes(listed(scan.val))])

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
    found = scan.scan_class_folders(root / "train")
    for _ in range(2):  # nothing of a failure is kept
        images, reasons = image_list.list_scanned(found)
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
    one = image_list.unreadable_images({"a.jpg": "empty"}, "replace it")
    assert one == "the image a.jpg cannot be read (empty); replace it"
    many = image_list.unreadable_images({f"{i}.jpg": "empty" for i in range(22)}, "replace them", ", listed")
    assert many.startswith("22 images cannot be read; replace them: 0.jpg (empty); 1.jpg (empty)")
    assert many.endswith("19.jpg (empty); and 2 more, listed")
    assert "more" not in image_list.unreadable_images({f"{i}.jpg": "" for i in range(20)}, "replace them")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("BITFLEET_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "bitfleet"
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="cache folder .*BITFLEET_CACHE"):
        cache_folder()


def test_a_full_cache_is_named_and_written_later(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, **arrays: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    found = scan_root(root).train
    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        with pytest.raises(ValueError, match=r"cache .*\(No space left on device\).*BITFLEET_CACHE"):
            image_list.list_scanned(found)
    assert listed(found).widths.tolist() == [10, 11, 10, 12]


@pytest.mark.parametrize("damage", ["empty", "truncated", "other bytes", "one bit", "other length", "other names"])
def test_a_damaged_cache_is_written_again(damage: str, root: Path) -> None:
    found = scan_root(root).train
    whole = listed(found)
    (file,) = cache_folder().glob("*.npz")
    content = file.read_bytes()
    if damage == "other length":
        np.savez(file, heights=whole.heights[1:], widths=whole.widths[1:])
    elif damage == "other names":
        np.savez(file, heights=whole.heights)
    else:
        place = content.index(whole.heights.tobytes())
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        file.write_bytes({"empty": b"", "truncated": content[:60], "other bytes": b"\x80" * 99}.get(damage, changed))
    assert listed(found).heights.tolist() == whole.heights.tolist()
    assert file.read_bytes() == content


COLUMNS = ("names", "labels", "heights", "widths", "sizes", "offsets")


def make_list(folder: Path, names: list[bytes], offsets: bool = False) -> ImageList:
    count = np.arange(len(names))
    return ImageList(
        folder=folder,
        names=np.array(names),
        labels=count.astype(np.int64) // 2,
        heights=count.astype(np.int32) + 200,
        widths=count.astype(np.int32) + 300,
        sizes=count.astype(np.int64) * 10**10,
        offsets=count.astype(np.int64) * 512 if offsets else None,
    )


def make(folder: Path, offsets: bool = False) -> Manifest:
    names = [b"a/x y.JPEG", "a/\u00e9.jpg".encode(), b"b/\xff#'\".jpg"]
    train = make_list(folder, [b"train/" + name for name in names], offsets)
    val = make_list(folder, [b"val/a.tar/" + name for name in names[:1]], offsets)
    return Manifest(train=train, val=val, classes=("a", "b"), layout="test", facts={"short_side": 256})


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, offsets: bool, inside: bool) -> None:
    files = tmp_path if inside else tmp_path / "elsewhere"
    written = make(files, offsets)
    sha = write_manifest(written, tmp_path)
    read, read_sha = read_manifest(tmp_path)
    assert sha == read_sha == sha_of([list_bytes(written.train), list_bytes(written.val)])
    for ours, theirs in ((written.train, read.train), (written.val, read.val)):
        for column in COLUMNS:
            assert np.array_equal(getattr(ours, column), getattr(theirs, column)), column
        assert theirs.folder == files
    assert (read.classes, read.layout, read.facts) == (written.classes, written.layout, written.facts)
    if inside:
        moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
        assert read_manifest(moved)[0].folder == moved


@pytest.mark.parametrize("file", ["train.tsv", "val.tsv"])
def test_a_changed_list_is_refused(tmp_path: Path, file: str) -> None:
    write_manifest(make(tmp_path), tmp_path)
    text = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(text.replace(b"\t200\t", b"\t201\t"))
    with pytest.raises(ValueError, match=r"train\.tsv .*manifest\.json .*sha256"):
        open_dataset(DataConfig(root=str(tmp_path)))
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=rf"{file} .*\(No such file"):
        open_dataset(DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json .*bitfleet data prepare"):
        open_dataset(DataConfig(root=str(tmp_path)))


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"format": 2}')
    with pytest.raises(ValueError, match="format 2.* 1"):
        open_dataset(DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize("odd", ["\t", "\n", "\r"])
def test_a_path_with_a_line_break_is_named(tmp_path: Path, odd: str) -> None:
    images = make_list(tmp_path, [b"train/a/1.jpg", f"train/a/2{odd}.jpg".encode()])
    with pytest.raises(ValueError, match=re.escape(f"{f'2{odd}.jpg'!r}"[1:]) + " .*tab"):
        list_bytes(images)


def test_quarantined_images_are_left_out_and_change_the_sha(tmp_path: Path) -> None:
    written = make(tmp_path)
    write_manifest(written, tmp_path)
    whole = open_dataset(DataConfig(root=str(tmp_path)))
    write_quarantine(tmp_path, {written.train.name(2): "cannot be decoded:\n bad\tdata", "of another list": "gone"})
    assert read_quarantine(tmp_path)[written.train.name(2)] == "cannot be decoded: bad data"
    rest = open_dataset(DataConfig(root=str(tmp_path)))
    assert (len(rest.train), len(rest.val), rest.num_quarantined) == (2, 1, 1)
    assert rest.train.heights.tolist() == [200, 201]
    assert rest.sha != whole.sha
    assert whole.train.without([]) is whole.train


def test_a_quarantine_that_was_edited_by_hand_is_named(tmp_path: Path) -> None:
    (tmp_path / "quarantine.tsv").write_text("path\treason\na.jpg\tbroken\ntrain/b.jpg\n")
    with pytest.raises(ValueError, match=r"line 3 of .*quarantine\.tsv .*'train/b\.jpg'"):
        read_quarantine(tmp_path)


def test_a_disk_that_takes_no_list_is_named(tmp_path: Path) -> None:
    (tmp_path / ".tmp-quarantine.tsv").mkdir()
    with pytest.raises(ValueError, match=r"quarantine\.tsv .*\(Is a directory\)"):
        write_quarantine(tmp_path, {"a": "broken"})


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    written = make(tmp_path)
    write_manifest(written, tmp_path)
    write_quarantine(tmp_path, {written.val.name(0): "broken"})
    with pytest.raises(ValueError, match=r"no validation image .*quarantine\.tsv"):
        open_dataset(DataConfig(root=str(tmp_path)))


def test_images_that_were_moved_away_from_their_manifest_are_missed(tmp_path: Path) -> None:
    write_manifest(make(tmp_path / "images"), tmp_path)
    with pytest.raises(ValueError, match=r"/images.* not there.*bitfleet data prepare"):
        open_dataset(DataConfig(root=str(tmp_path)))


def test_merged_lists_are_in_the_order_of_class_folders(tmp_path: Path) -> None:
    a = make_list(tmp_path, [b"9", b"2", b"1"])
    b = make_list(tmp_path, [b"5"])
    assert merge([a, b]).names.tolist() == [b"2", b"5", b"9", b"1"]


def test_names_of_images_in_shards() -> None:
    assert shard_and_member("train/000001.tar/n01/a.jpg") == ("train/000001.tar", "n01/a.jpg")
    assert shard_and_member("VERİ-SETİ.TAR/a.tar/b.jpg") == ("VERİ-SETİ.TAR", "a.tar/b.jpg")  # longer in lower case


@pytest.mark.parametrize("change", [("classes", 3), ("longest_path", "29"), ("classes", ["a"])])
def test_a_manifest_changed_by_hand_is_refused(tmp_path: Path, change: tuple[str, object]) -> None:
    write_manifest(make(tmp_path), tmp_path)
    facts = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(facts | dict([change])))
    with pytest.raises(ValueError, match=r"manifest\.json .*(read|1 classes .* 2)"):
        open_dataset(DataConfig(root=str(tmp_path)))
