"""Files that vanish or break under a loader, a disk that does not answer, and images in shards."""

import contextlib
import dataclasses
import hashlib
import io
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from bitfleet.launch.data.manifest import write_manifest
from bitfleet.trainer.data import DataConfig, Dataset, TrainLoader, ValidationLoader, open_dataset
from bitfleet.trainer.data.image_list import ImageList, Manifest
from tests.unit.trainer.data.test_images import photo

CPU = torch.device("cpu")

LOADERS = ("dali", "torch", "memory")
CONFIG = DataConfig(
    augmentation="random_resized_crop", image_size=32, val_batch_size=4, num_threads=2, on_bad_sample="replace"
)
NUM_TRAIN, NUM_VAL, BATCH = 26, 10, 8


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos in two classes; what is done to them is a test's own."""
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for index in range(count):
            folder = tmp_path / "data" / split / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            photo(60 + index, 80, index).save(folder / f"{index:02d}.jpg", quality=90)
    return tmp_path / "data"


def config_of(root: Path, loader: str = "dali", **changes: Any) -> DataConfig:
    return dataclasses.replace(CONFIG, root=str(root), loader=loader, **changes)  # type: ignore[arg-type]


def train_loader(dataset: Dataset, config: DataConfig, rank: int = 0, world_size: int = 1) -> TrainLoader:
    return TrainLoader(
        dataset,
        config,
        seed=5,
        global_batch_size=BATCH,
        num_replicas=4,
        rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        device=CPU,
    )


def validation_loader(dataset: Dataset, config: DataConfig) -> ValidationLoader:
    return ValidationLoader(dataset, config, rank=0, world_size=1, local_world_size=1, device=CPU)


def digests(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], count: int) -> list[str]:
    return [
        hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        for images, labels in islice(batches, count)
    ]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def become_text(path: Path) -> None:
    path.write_text("<html>")


def become_smaller(path: Path) -> None:
    photo(20, 20).save(path)


def become_larger(path: Path) -> None:
    photo(120, 130).save(path)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", [Path.unlink, truncate, become_smaller, become_larger])
def test_replacements_are_the_same_on_any_number_of_ranks_and_after_a_resume(
    root: Path, damage: Callable[[Path], None], loader: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(root, loader)
    dataset = open_dataset(config)
    clean = digests(train_loader(dataset, config).batches(), 4 * 7)
    for broken in (2, 9, 20):
        damage(Path(dataset.train.path(broken)))
    one = train_loader(dataset, config)
    whole = digests(one.batches(), 4 * 7)
    assert one.num_replaced > 0
    assert whole != clean
    assert len(set(whole)) == len(whole)
    assert whole == digests(train_loader(dataset, config).batches(), 4 * 7)
    two = [digests(train_loader(dataset, config, rank, 2).batches(), 2 * 7) for rank in range(2)]
    assert [d for step in range(7) for share in two for d in share[2 * step : 2 * step + 2]] == whole
    assert digests(train_loader(dataset, config).batches(4), 4 * 3) == whole[4 * 4 :]
    lines = [line for line in capfd.readouterr().err.splitlines() if "replaced by" in line]
    assert lines
    assert all("rank 0: the image" in line or "rank 1: the image" in line for line in lines)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_image_of_a_batch_may_be_gone(root: Path, loader: str) -> None:
    config = config_of(root, loader)
    dataset = open_dataset(config)
    kept = set(range(0, NUM_TRAIN, 5))
    for index in set(range(NUM_TRAIN)) - kept:
        Path(dataset.train.path(index)).unlink()
    images, labels = next(train_loader(dataset, config).batches())
    assert images.shape == (2, 32, 32, 3)
    assert images.float().std() > 10
    assert set(labels.tolist()) <= set(dataset.train.labels[list(kept)].tolist())


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_of_which_nothing_can_be_read_ends(root: Path, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfleet.trainer.data.bad_samples._MOST_ATTEMPTS", 3)
    config = config_of(root, loader)
    dataset = open_dataset(config)
    for index in range(NUM_TRAIN):
        Path(dataset.train.path(index)).write_bytes(b"")
    with pytest.raises(ValueError, match=r"3 others .*jpg"):
        next(train_loader(dataset, config).batches())


@pytest.mark.parametrize("loader", LOADERS)
def test_past_the_limit_a_run_ends(root: Path, loader: str) -> None:
    config = config_of(root, loader, max_bad_samples=2)
    dataset = open_dataset(config)
    for index in range(0, NUM_TRAIN, 4):
        Path(dataset.train.path(index)).unlink()
    with pytest.raises(ValueError, match=r"data\.max_bad_samples=2 .*jpg"):
        digests(train_loader(dataset, config).batches(), 4 * 12)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_image_that_is_missing_in_every_epoch_counts_once(root: Path, loader: str) -> None:
    config = config_of(root, loader, max_bad_samples=1)
    dataset = open_dataset(config)
    Path(dataset.train.path(3)).unlink()
    endless = train_loader(dataset, config)
    digests(endless.batches(), 4 * 3 * 8)
    assert endless.num_replaced > 1


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("broken", [[0], [5, 9], [4, 5, 6, 7]])
def test_validation_leaves_out_what_it_cannot_read(root: Path, loader: str, broken: list[int]) -> None:
    config = config_of(root, loader)
    dataset = open_dataset(config)
    whole = torch.cat([images for images, _ in validation_loader(dataset, config)])
    for index in broken:
        Path(dataset.val.path(index)).write_bytes(b"no image")
    validation = validation_loader(dataset, config)
    batches = list(validation)
    kept = [index for index in range(NUM_VAL) if index not in broken]
    assert len(batches) == len(validation) == 3
    assert torch.equal(torch.cat([images for images, _ in batches]), whole[kept])
    assert torch.cat([labels for _, labels in batches]).tolist() == dataset.val.labels[kept].tolist()


def lose_its_end(path: Path) -> None:
    os.truncate(path, 30)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", [Path.unlink, empty, become_text, lose_its_end])
def test_a_broken_image_in_a_large_batch_does_not_crash_the_process(
    root: Path, loader: str, damage: Callable[[Path], None]
) -> None:
    """DALI 2.4 by itself does crash at it, in about half of these iterations, from 32 images in a
    batch on."""
    for index in range(NUM_VAL, 64):
        photo(60, 80, index).save(root / "val/a" / f"{index}.jpg")
    config = config_of(root, loader, val_batch_size=64)
    dataset = open_dataset(config)
    damage(Path(dataset.val.path(3)))
    loaded = [validation_loader(dataset, config) for _ in range(4)]
    assert [sum(len(labels) for _, labels in each) for each in loaded] == [63] * 4


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(Path.unlink, "No such file"), (empty, "the file is empty"), (become_text, "it is not an image")],
)
def test_fail_names_the_image_and_the_ways_out(
    root: Path, loader: str, damage: Callable[[Path], None], reason: str
) -> None:
    config = config_of(root, loader, on_bad_sample="fail")
    dataset = open_dataset(config)
    damage(Path(dataset.train.path(3)))
    with pytest.raises(ValueError, match=rf"a/06\.jpg .*\({reason}.*data verify.*on_bad_sample repl"):
        digests(train_loader(dataset, config).batches(), 4 * 12)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_disk_that_does_not_answer_is_named(root: Path, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named pipe that nobody writes to: opening it never returns, as on a network mount whose
    server is gone."""
    monkeypatch.setattr("bitfleet.trainer.data.stall._PROBE_SECONDS", 0.5)
    config = config_of(root, loader, stall_seconds=1.0)
    dataset = open_dataset(config)
    path = Path(dataset.train.path(3))
    path.unlink()
    os.mkfifo(path)
    try:
        with pytest.raises(ValueError, match=r"disk .*/a/06\.jpg .* 1 s.*data\.stall_seconds"):
            digests(train_loader(dataset, config).batches(), 4 * 12)
    finally:
        free = threading.Thread(target=answer, args=(path,), daemon=True)
        free.start()


def test_a_manifest_on_a_disk_that_does_not_answer_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    try:
        with pytest.raises(ValueError, match=r"disk .*/manifest\.json .* 0\.2 s"):
            open_dataset(DataConfig(root=str(tmp_path), stall_seconds=0.2))
    finally:
        answer(tmp_path / "manifest.json")


def answer(path: Path) -> None:
    """Let go of the threads that wait for the pipe: the test's process is to end."""
    for _ in range(20):
        with contextlib.suppress(OSError):  # nobody waits
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.05)


def in_shards(root: Path, dest: Path) -> None:
    """The data set `root` as uncompressed tars of 4 images, with a manifest in the order of the
    folders."""
    dataset = open_dataset(DataConfig(root=str(root)))
    lists = []
    for split, images in (("train", dataset.train), ("val", dataset.val)):
        names, offsets = [], []
        for first in range(0, len(images), 4):
            shard = f"{split}/{first // 4:06d}.tar"
            (dest / split).mkdir(parents=True, exist_ok=True)
            with tarfile.open(dest / shard, "w") as tar:
                for index in range(first, min(first + 4, len(images))):
                    encoded = images.read(index)
                    member = tarfile.TarInfo(f"{index:06d}.jpg")
                    member.size = len(encoded)
                    tar.addfile(member, io.BytesIO(encoded))
            with tarfile.open(dest / shard) as tar:
                names += [f"{shard}/{member.name}".encode() for member in tar]
                offsets += [member.offset_data for member in tar]
        packed = dataclasses.replace(images, folder=dest, names=np.array(names), offsets=np.array(offsets, np.int64))
        assert [packed.read(index) for index in range(len(images))] == [
            images.read(index) for index in range(len(images))
        ]
        lists.append(packed)
    write_manifest(Manifest(train=lists[0], val=lists[1], classes=dataset.classes, layout="shards"), dest)


@pytest.mark.parametrize("loader", LOADERS)
def test_shards_give_the_bytes_of_the_files(root: Path, tmp_path: Path, loader: str) -> None:
    in_shards(root, tmp_path / "shards")
    files, shards = config_of(root, loader), config_of(tmp_path / "shards", loader)
    dataset, sharded = open_dataset(files), open_dataset(shards)
    whole = digests(train_loader(dataset, files).batches(), 4 * 7)
    assert digests(train_loader(sharded, shards).batches(), 4 * 7) == whole
    assert digests(train_loader(sharded, shards).batches(4), 4 * 3) == whole[4 * 4 :]
    two = [digests(train_loader(sharded, shards, rank, 2).batches(), 2 * 7) for rank in range(2)]
    assert [d for step in range(7) for share in two for d in share[2 * step : 2 * step + 2]] == whole
    assert digests(iter(validation_loader(sharded, shards)), 99) == digests(iter(validation_loader(dataset, files)), 99)
    again = validation_loader(sharded, shards)
    assert digests(iter(again), 1) == digests(iter(again), 1)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("policy", ["fail", "replace"])
def test_a_truncated_shard(root: Path, tmp_path: Path, loader: str, policy: Literal["fail", "replace"]) -> None:
    in_shards(root, tmp_path / "shards")
    config = config_of(tmp_path / "shards", loader, on_bad_sample=policy)
    dataset = open_dataset(config)
    assert dataset.train.offsets is not None
    os.truncate(tmp_path / "shards/train/000001.tar", int(dataset.train.offsets[6]) + 100)
    if policy == "fail":
        with pytest.raises(ValueError, match=r"000001\.tar/00000[67]\.jpg .*\(the shard .* ends"):
            digests(train_loader(dataset, config).batches(), 4 * 12)
        return
    batches = train_loader(dataset, config)
    whole = digests(batches.batches(), 4 * 7)
    assert batches.num_replaced > 0
    assert digests(train_loader(dataset, config).batches(5), 4 * 2) == whole[4 * 5 :]


def test_reading_beyond_a_shard_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    one = np.ones(1, np.int64)
    images = ImageList(
        folder=tmp_path,
        names=np.array([b"a.tar/x"]),
        labels=one,
        heights=one,
        widths=one,
        sizes=one * 4,
        offsets=one * 6,
    )
    assert images.read(0) == b"6789"
    with pytest.raises(OSError, match="shard .* ends"):
        dataclasses.replace(images, offsets=one * 7).read(0)
