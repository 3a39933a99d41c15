"""Shards: what is in them, where, and packing what is in shards again."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.launch.data import packed_shards
from bitfleet.trainer.data import DataConfig, open_dataset
from bitfleet.trainer.data.images import ImageList, shard_and_member
from bitfleet.trainer.data.manifest import Manifest, read_manifest, write_manifest
from tests.unit.conftest import contents, lists
from tests.unit.launch.data.test_pack import run


@pytest.mark.usefixtures("small_shards")
def test_shards_hold_what_files_do(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "files")
    run(source, tmp_path / "shards", shards=True)
    assert set(contents(tmp_path / "shards")) == {
        *(f"{split}/{shard:06d}.tar" for split in ("train", "val") for shard in range(5)),
        *("manifest.json", "train.tsv", "val.tsv", "classes.txt"),
    }
    assert (tmp_path / "shards/classes.txt").read_text() == "ant\nbee\ncat\n"
    for ours, theirs in zip(lists(tmp_path / "shards"), lists(tmp_path / "files"), strict=True):
        assert ours.offsets is not None
        for column in ("labels", "heights", "widths", "sizes"):
            np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))
        for index in range(24):
            shard, member = shard_and_member(ours.name(index))
            key, suffix = member.split(".")
            assert key.startswith(f"{index:07d}-")
            assert suffix == "jpg"
            with tarfile.open(ours.folder / shard) as tar:
                image, label = tar.extractfile(member), tar.extractfile(f"{key}.cls")
                assert image is not None
                assert label is not None
                assert image.read() == ours.read(index) == theirs.read(index)
                assert int(label.read()) == ours.labels[index]
                assert tar.getmember(member).offset_data == ours.offsets[index]
                assert {info.mtime for info in tar} == {0}
    dataset = open_dataset(DataConfig(root=str(tmp_path / "shards")))
    assert dataset.train.read(23) == lists(tmp_path / "files")[0].read(23)


def test_a_shard_ends_before_it_is_too_large(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    monkeypatch.setattr(packed_shards, "_IMAGES_PER_SHARD", 4)
    monkeypatch.setattr(packed_shards, "_BYTES_PER_SHARD", 100)
    train, _ = lists(source)
    sizes = np.array([10] * 6 + [60, 40, 1, 500, 1] + [10] * 13, np.int64)
    names = packed_shards.shard_names(train, "train", sizes)
    shards = [int(name[6:12]) for name in names]
    assert shards[:14] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 4]


@pytest.mark.usefixtures("small_shards")
def test_packed_again(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "shards", short_side=48, shards=True)
    run(source, tmp_path / "files", short_side=48)
    for first in ("shards", "files"):
        for shards in (False, True):
            dest = tmp_path / f"{first}-{shards}"
            run(tmp_path / first, dest, short_side=32, shards=shards)
            again = read_manifest(dest)[0]
            assert again.facts["packed"] == {
                "short_side": 32,
                "quality": 90,
                "of": read_manifest(tmp_path / first)[1],
            }
            for ours, theirs in zip((again.train, again.val), lists(source), strict=True):
                np.testing.assert_array_equal(ours.labels, theirs.labels)
                assert ours.heights[:3].tolist() == [32, 48, 32]
    train, _ = lists(tmp_path / "shards-False")
    assert train.name(8) == "train/bee/0000008-bee_0.jpg"
    pixels = {
        tuple(lists(tmp_path / f"{first}-{shards}")[0].read(index) for index in range(24))
        for first in ("shards", "files")
        for shards in (False, True)
    }
    assert len(pixels) == 1


def test_shards_of_others_become_class_folders(source: Path, tmp_path: Path) -> None:
    """Keys that are unique in their shard only, members in folders, and class names that no folder can have."""
    originals = lists(source)
    packed: list[ImageList] = []
    for split, images in zip(("train", "val"), originals, strict=True):
        (tmp_path / "wds" / split).mkdir(parents=True)
        names, offsets = [], []
        for number in range(2):
            file = tmp_path / "wds" / split / f"{number}.tar"
            with tarfile.open(file, "w") as tar:
                for index in range(2):
                    info = tarfile.TarInfo(f"deep/{index}.jpg")
                    info.size = int(images.sizes[index])
                    tar.addfile(info, io.BytesIO(images.read(index)))
            with tarfile.open(file) as tar:
                names += [f"{split}/{number}.tar/{info.name}" for info in tar]
                offsets += [info.offset_data for info in tar]
        part = images.select(np.array([0, 1, 0, 1]))
        packed.append(
            ImageList(
                folder=tmp_path / "wds",
                names=np.array([os.fsencode(name) for name in names]),
                labels=np.array([0, 1, 0, 2], np.int64),
                heights=part.heights,
                widths=part.widths,
                sizes=part.sizes,
                offsets=np.array(offsets, np.int64),
            )
        )
    train, val = packed
    write_manifest(
        Manifest(train=train, val=val, classes=("great white", "cock/hen", ".x"), layout="WebDataset"), tmp_path / "wds"
    )
    run(tmp_path / "wds", tmp_path / "packed")
    train, _ = lists(tmp_path / "packed")
    assert [train.name(index) for index in range(4)] == [
        "train/great white/0.jpg",
        "train/class1/1.jpg",
        "train/great white/1-0.jpg",
        "train/class2/1.jpg",
    ]
    with Image.open(train.path(3)) as image:
        assert image.size == (48, 72)
