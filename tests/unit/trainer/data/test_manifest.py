"""Manifests: what is written is read again, from anywhere, and a list that was changed is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bitfleet.trainer.data import DataConfig, open_dataset
from bitfleet.trainer.data.images import ImageList, shard_and_member
from bitfleet.trainer.data.manifest import (
    FILE,
    Manifest,
    lists_sha,
    merge,
    read_manifest,
    read_quarantine,
    without,
    write_manifest,
    write_quarantine,
)

COLUMNS = ("names", "labels", "heights", "widths", "sizes", "offsets")


def image_list(folder: Path, names: list[bytes], offsets: bool = False) -> ImageList:
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
    train = image_list(folder, [b"train/" + name for name in names], offsets)
    val = image_list(folder, [b"val/a.tar/" + name for name in names[:1]], offsets)
    return Manifest(train=train, val=val, classes=("a", "b"), layout="test", facts={"short_side": 256})


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_written_is_read_again(tmp_path: Path, offsets: bool, inside: bool) -> None:
    files = tmp_path if inside else tmp_path / "elsewhere"
    written = make(files, offsets)
    sha = write_manifest(written, tmp_path)
    read, read_sha = read_manifest(tmp_path)
    assert sha == read_sha == lists_sha(written.train, written.val)
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
    with pytest.raises(ValueError, match="are not those of its manifest.json"):
        open_dataset(DataConfig(root=str(tmp_path)))
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=rf"{file} cannot be read \(No such file"):
        open_dataset(DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read: run bitfleet data prepare again"):
        open_dataset(DataConfig(root=str(tmp_path)))


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"format": 2}')
    with pytest.raises(ValueError, match="has format 2; this bitfleet reads format 1"):
        open_dataset(DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize("odd", ["\t", "\n", "\r"])
def test_a_path_with_a_line_break_is_named(tmp_path: Path, odd: str) -> None:
    images = image_list(tmp_path, [b"train/a/1.jpg", f"train/a/2{odd}.jpg".encode()])
    with pytest.raises(ValueError, match=re.escape(f"{f'2{odd}.jpg'!r}"[1:] + " has a tab or a line break")):
        lists_sha(images, images)


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
    assert without(whole.train, []) is whole.train


def test_a_quarantine_that_was_edited_by_hand_is_named(tmp_path: Path) -> None:
    (tmp_path / "quarantine.tsv").write_text("path\treason\na.jpg\tbroken\ntrain/b.jpg\n")
    with pytest.raises(ValueError, match=r"line 3 of .*quarantine\.tsv is 'train/b\.jpg': expected a path, a tab"):
        read_quarantine(tmp_path)


def test_a_disk_that_takes_no_list_is_named(tmp_path: Path) -> None:
    (tmp_path / ".tmp-quarantine.tsv").mkdir()
    with pytest.raises(ValueError, match=r"quarantine\.tsv cannot be written \(Is a directory\)"):
        write_quarantine(tmp_path, {"a": "broken"})


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    written = make(tmp_path)
    write_manifest(written, tmp_path)
    write_quarantine(tmp_path, {written.val.name(0): "broken"})
    with pytest.raises(ValueError, match=r"no validation image left: .*quarantine\.tsv"):
        open_dataset(DataConfig(root=str(tmp_path)))


def test_images_that_were_moved_away_from_their_manifest_are_missed(tmp_path: Path) -> None:
    write_manifest(make(tmp_path / "images"), tmp_path)
    with pytest.raises(ValueError, match=r"lie in .*images, which is not there: mount it, or, if they were moved"):
        open_dataset(DataConfig(root=str(tmp_path)))


def test_merged_lists_are_in_the_order_of_class_folders(tmp_path: Path) -> None:
    a = image_list(tmp_path, [b"9", b"2", b"1"])
    b = image_list(tmp_path, [b"5"])
    assert merge([a, b]).names.tolist() == [b"2", b"5", b"9", b"1"]


def test_names_of_images_in_shards() -> None:
    assert shard_and_member("train/000001.tar/n01/a.jpg") == ("train/000001.tar", "n01/a.jpg")


@pytest.mark.parametrize("change", [("classes", 3), ("longest_path", "29"), ("classes", ["a"])])
def test_a_manifest_changed_by_hand_is_refused(tmp_path: Path, change: tuple[str, object]) -> None:
    write_manifest(make(tmp_path), tmp_path)
    facts = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(facts | dict([change])))
    with pytest.raises(ValueError, match=r"manifest\.json (cannot be read|names 1 classes and its lists have 2)"):
        open_dataset(DataConfig(root=str(tmp_path)))
