"""Batches in parts: where they are cut, and that nobody sees it."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitfleet.trainer.data import (
    DataConfig,
    Dataset,
    TrainLoader,
    ValidationLoader,
    open_dataset,
    torch_pipeline,
)
from bitfleet.trainer.data.image_list import ImageList
from bitfleet.trainer.data.request import Decoded, Request, in_parts, joined_parts, slices_of
from bitfleet.trainer.data.sampler import Windows
from tests.unit.trainer.data.test_images import photo

ONE_RANK: Any = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": torch.device("cpu")}


def test_runs_are_as_long_as_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfleet.trainer.data.request.MOST_BYTES", 10)
    for sizes, most_items, ends in (
        ([4, 4, 4, 4, 4], None, [2, 4, 5]),
        ([30, 1, 30, 30, 5, 5, 1], None, [1, 2, 3, 4, 6, 7]),
        ([1, 1, 1, 1, 1], 2, [2, 4, 5]),
        ([10], None, [1]),
        ([], None, [0]),
    ):
        found = slices_of(np.array(sizes, np.int64), most_items)
        assert [cut.stop for cut in found] == ends
        assert [cut.start for cut in found] == [0, *ends[:-1]]


def request_of(sides: list[int]) -> Request:
    count = len(sides)
    images = ImageList(
        folder=Path("/nowhere"),
        names=np.array([b"%d" % index for index in range(count)]),
        labels=np.arange(count),
        heights=np.array(sides, np.int32),
        widths=np.array(sides, np.int32),
        sizes=np.ones(count, np.int64),
    )
    starts = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    return Request(images, np.arange(count)[::-1], Windows(starts, starts + 1), np.arange(count, dtype=np.int32), 3)


def test_parts_make_the_batch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfleet.trainer.data.request.MOST_BYTES", 3 * 20 * 20)
    requests = [request_of([10, 10, 30, 10, 10, 10]), request_of([5]), request_of([30, 30])]
    cut = list(in_parts(requests))
    assert [len(part.samples) for part in cut] == [3, 1, 2, 1, 1, 1]
    assert [part.ends_batch for part in cut] == [False, False, True, True, False, True]

    def decoded() -> Iterator[Decoded]:
        for part in cut:
            yield [torch.tensor(int(sample)) for sample in part.samples], part

    for (images, whole), request in zip(joined_parts(decoded()), requests, strict=True):
        assert [int(image) for image in images] == request.samples.tolist() == whole.samples.tolist()
        assert torch.equal(whole.labels, request.labels)
        assert whole.epoch == request.epoch
        for ours, theirs in ((whole.flips, request.flips), *zip(whole.windows, request.windows, strict=True)):
            np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index in range(13):
            photo(60 + 7 * index, 90, index).save(tmp_path / split / "a" / f"{index:02d}.jpg")
    return tmp_path


def batches(config: DataConfig, dataset: Dataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All of validation and 5 batches of training."""
    loader = TrainLoader(dataset, config, seed=1, global_batch_size=6, num_replicas=1, **ONE_RANK)
    return [*ValidationLoader(dataset, config, **ONE_RANK), *islice(loader.batches(), 5)]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        DataConfig(augmentation="random_resized_crop", image_size=32),
        DataConfig(augmentation="random_resized_crop", image_size=32, preprocessing="official"),
        DataConfig(image_size=32),
    ],
)
def test_large_images_change_no_batch(
    root: Path, monkeypatch: pytest.MonkeyPatch, config: DataConfig, damaged: bool
) -> None:
    config = dataclasses.replace(
        config, root=str(root), val_batch_size=5, num_threads=2, on_bad_sample="replace" if damaged else "fail"
    )
    dataset = open_dataset(config)
    if damaged:
        for name in ("train/a/03.jpg", "val/a/03.jpg", "val/a/04.jpg"):
            (root / name).write_bytes(b"")
    whole, counts = batches(config, dataset), []
    monkeypatch.setattr("bitfleet.trainer.data.request.MOST_BYTES", 3 * 120 * 90 * 2)
    cut = Request.part
    monkeypatch.setattr(Request, "part", lambda self, part: counts.append(part) or cut(self, part))
    in_pieces = batches(config, dataset)
    assert len(counts) > len(whole)
    for (images, labels), (others, their_labels) in zip(whole, in_pieces, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, their_labels)


def test_pillow_decodes_one_large_image_at_a_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(
        root=str(root), augmentation="random_resized_crop", image_size=32, loader="torch", num_threads=4
    )
    under_way, most, decode = [0], [0], torch_pipeline.image_of

    def counted(request: Request, position: int) -> Any:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        try:
            return decode(request, position)
        finally:
            under_way[0] -= 1

    dataset = open_dataset(config)
    ordinary = batches(config, dataset)
    monkeypatch.setattr(torch_pipeline, "_LARGE_PIXELS", 0)
    monkeypatch.setattr(torch_pipeline, "image_of", counted)
    for (images, _), (others, _) in zip(ordinary, batches(config, dataset), strict=True):
        assert torch.equal(images, others)
    assert most[0] == 1


def test_windows_do_not_wait_for_their_batch(root: Path) -> None:
    """On a CPU each is resized by the thread that decoded it: those of three batches would be in
    memory."""
    config = DataConfig(
        root=str(root), augmentation="random_resized_crop", preprocessing="official", image_size=32, loader="torch"
    )
    loader = ValidationLoader(open_dataset(config), config, **ONE_RANK)
    ((images, _),) = loader._pipeline.decoded(loader._requests(), loader._bad.leave_out)  # type: ignore[attr-defined]
    assert [(image.shape, image.dtype) for image in images] == [((32, 32, 3), torch.float32)] * 13
