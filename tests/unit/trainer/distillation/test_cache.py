import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfleet.trainer.data import DataConfig, stream_settings
from bitfleet.trainer.data.sampler import epoch_permutation, micro_batches
from bitfleet.trainer.distillation import cache as cache_module
from bitfleet.trainer.distillation.cache import (
    CachedLogits,
    LogitCache,
    create,
    identity_of_logits,
    layout_for,
    open_cache,
    positions,
)

CPU = torch.device("cpu")
NUM_IMAGES, NUM_CLASSES, SIZE = 27, 3, 4


def identity(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "teacher": "resnet34",
        "from_file": True,
        "weights_sha256": "ab" * 32,
        "num_classes": NUM_CLASSES,
        "precision": "fp32",
        "seed": 0,
        "data_sha": "cd" * 32,
        "images": stream_settings(DataConfig(), "cpu"),
        "micro_batch_size": SIZE,
    }
    return identity_of_logits(**(values | changes))


def expected(epoch: int) -> Tensor:
    """The logits of an epoch: whole micro-batches of 27 images are 24 rows."""
    return torch.randn(24, NUM_CLASSES, generator=torch.Generator().manual_seed(epoch)).half()


def calls(epoch: int, log: list[int], num: int = 99) -> Any:
    """A teacher that dies after `num` micro-batches; the rows that it starts from go to `log`."""

    def call(row: int) -> Iterator[Tensor]:
        log.append(row)
        yield from itertools.islice(expected(epoch)[row:].split(SIZE), num)
        raise KeyboardInterrupt

    return call


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LogitCache:
    """Shards of two micro-batches: three per epoch."""
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 2 * 2 * NUM_CLASSES * SIZE)
    return create(tmp_path / "logits", identity(), layout_for(NUM_IMAGES, NUM_CLASSES, SIZE), {"versions": {}})


def read_all(cache: LogitCache, epoch: int) -> Tensor:
    return torch.from_numpy(np.concatenate([cache.read(epoch, shard) for shard in range(cache.layout.num_shards)]))


def test_sizes(cache: LogitCache) -> None:
    assert cache.layout == (NUM_CLASSES, SIZE, 24, 8)
    assert cache.layout.num_shards == 3
    assert cache.layout.bytes_per_epoch == 24 * 3 * 2
    imagenet = layout_for(1_281_167, 1000, 64)
    assert imagenet.bytes_per_epoch == 2 * 1000 * (1_281_167 // 64 * 64)
    assert imagenet.rows_per_shard % 64 == 0
    assert 31e6 < 2000 * imagenet.rows_per_shard <= cache_module.SHARD_BYTES or cache_module.SHARD_BYTES < 1e6
    assert sum(imagenet.rows_of(shard) for shard in range(imagenet.num_shards)) == imagenet.rows_per_epoch


def test_written_epochs_read_back(cache: LogitCache) -> None:
    for epoch in (0, 7):
        assert cache.write_epoch(epoch, calls(epoch, [])) == 24
        assert torch.equal(read_all(cache, epoch), expected(epoch))
    assert cache.has(7)
    assert not cache.has(1)
    assert cache.write_epoch(7, calls(7, log := [])) == 0
    assert log == []


def test_interrupted_epoch_continues_at_its_shard(cache: LogitCache) -> None:
    with pytest.raises(KeyboardInterrupt):
        cache.write_epoch(0, calls(0, [], num=5))  # in the third shard
    assert not cache.has(0)
    (cache.folder / ".tmp-epoch-00000-00002.npy").write_bytes(b"half of it")
    assert cache.write_epoch(0, calls(0, log := [])) == 8
    assert log == [16]
    assert torch.equal(read_all(cache, 0), expected(0))


def test_shard_that_was_not_listed_before_the_kill_is_written_again(cache: LogitCache) -> None:
    cache.write_epoch(0, calls(0, []))
    index = cache.folder / "epoch-00000.json"
    written = json.loads(index.read_text())
    del written["epoch-00000-00001.npy"]
    index.write_text(json.dumps(written))
    assert cache.write_epoch(0, calls(0, log := [])) == 8
    assert log == [8]
    index.write_text("{")
    assert cache.write_epoch(0, calls(0, log := [])) == 24
    assert log == [0]


def test_damaged_shard_is_found_and_repaired(cache: LogitCache) -> None:
    cache.write_epoch(0, calls(0, []))
    path = cache.folder / "epoch-00000-00001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} are damaged .*bitfleet data teach"):
        cache.read(0, 1)
    assert cache.write_epoch(0, calls(0, log := [])) == 8
    assert log == [8]
    assert torch.equal(read_all(cache, 0), expected(0))
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} cannot be read .*bitfleet data teach"):
        cache.read(0, 1)


def test_logits_that_are_not_finite_are_refused(cache: LogitCache) -> None:
    def call(row: int) -> Iterator[Tensor]:
        yield from torch.full((24, NUM_CLASSES), 1e5).half().split(SIZE)

    with pytest.raises(ValueError, match=r"logits of epoch 2 are not finite.*65,504"):
        cache.write_epoch(2, call)


def test_missing_epochs_are_named(cache: LogitCache) -> None:
    for epoch in (0, 1, 4):
        cache.write_epoch(epoch, calls(epoch, []))
    cache.check_has(range(2))
    cache.check_has([])
    with pytest.raises(ValueError, match=r"epoch 2 is missing in .*--first_epoch 2 --last_epoch 2"):
        cache.check_has(range(3))
    with pytest.raises(ValueError, match=r"3 epochs from 2 to 5 are missing in .*--first_epoch 2 --last_epoch 5"):
        cache.check_has(range(6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "resnet50"}, "teacher is resnet34 there and resnet50 in this run"),
        ({"from_file": False, "weights_sha256": None}, "weights is from a file there and timm's in this run"),
        ({"weights_sha256": "00" * 32}, r"weights \(sha256\) is abab.* there and 0000"),
        ({"num_classes": 4}, "num_classes is 3 there and 4"),
        ({"precision": "bf16"}, "precision is fp32 there and bf16"),
        ({"seed": 1}, "seed is 0 there and 1"),
        ({"data_sha": "00" * 32}, r"data \(sha256\) is cdcd.* there and 0000"),
        ({"images": stream_settings(DataConfig(flip=False), "cpu")}, "data.flip is True there and False"),
        ({"images": stream_settings(DataConfig(mean=(0, 0, 0)), "cpu")}, "data.mean is .*123.*there and .*0.0"),
        ({"images": stream_settings(DataConfig(), "cuda")}, "data.device is cpu there and gpu"),
        ({"micro_batch_size": 8}, r"micro-batch size \(global_batch_size / num_replicas\) is 4 there and 8"),
    ],
)
def test_cache_of_something_else_is_refused(cache: LogitCache, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{cache.folder} .*made for something else: {message}"):
        open_cache(cache.folder.parent, identity(**changes))


def test_what_does_not_decide_the_logits_may_differ(cache: LogitCache) -> None:
    data = dataclasses.replace(DataConfig(), root="/elsewhere", loader="memory", num_threads=3, val_batch_size=7)
    opened = open_cache(cache.folder.parent, identity(images=stream_settings(data, "cpu")))
    assert (opened.folder, opened.layout) == (cache.folder, cache.layout)
    assert opened.weights_sha256 == "ab" * 32


def test_weights_of_timm_need_not_be_loaded_to_read(tmp_path: Path) -> None:
    layout = layout_for(NUM_IMAGES, NUM_CLASSES, SIZE)
    create(tmp_path / "hub", identity(from_file=False), layout, {})
    assert open_cache(tmp_path / "hub", identity(from_file=False, weights_sha256=None)).weights_sha256 == "ab" * 32


def test_one_folder_serves_many_runs(cache: LogitCache) -> None:
    """As the seeds of a sweep; where none fits, the nearest is compared."""
    root, layout = cache.folder.parent, cache.layout
    other = create(root, identity(seed=1, teacher="vit", num_classes=9), layout, {})
    second = create(root, identity(seed=1), layout, {})
    assert len({cache.folder, other.folder, second.folder}) == 3
    assert second.folder.name.startswith("resnet34-seed1-")
    assert open_cache(root, identity()).folder == cache.folder
    assert open_cache(root, identity(seed=1)).folder == second.folder
    assert create(root, identity(seed=1), layout, {}).folder == second.folder
    with pytest.raises(ValueError, match=f"{second.folder} .*: num_classes is 3 there and 4 in"):
        open_cache(root, identity(seed=1, num_classes=4))


def test_folders_that_are_no_cache(tmp_path: Path, cache: LogitCache) -> None:
    with pytest.raises(ValueError, match=r"no logits of a teacher in .*nothing .*bitfleet data teach"):
        open_cache(tmp_path / "nothing", identity())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written into .*file \(Not a directory\).*--distill.cache"):
        create(tmp_path / "file", identity(), cache.layout, {})
    (cache.folder / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        open_cache(cache.folder.parent, identity())


@pytest.mark.parametrize(("num_replicas", "world_size"), [(1, 1), (4, 1), (4, 2), (2, 2)])
def test_positions_are_those_of_the_sampler(num_replicas: int, world_size: int) -> None:
    """Row i of an epoch is the i-th sample of its order, whatever the ranks."""
    batch, steps_per_epoch = 8, 27 // 8
    for rank, start in itertools.product(range(world_size), (0, 2, 7)):
        place = {"rank": rank, "world_size": world_size}
        read = positions(
            start_step=start,
            steps_per_epoch=steps_per_epoch,
            global_batch_size=batch,
            num_replicas=num_replicas,
            **place,
        )
        drawn = micro_batches(
            seed=3, num_samples=27, global_batch_size=batch, num_replicas=num_replicas, start_step=start, **place
        )
        for (epoch, row), (epoch_drawn, samples) in itertools.islice(zip(read, drawn, strict=False), 30):
            assert epoch == epoch_drawn
            order = epoch_permutation(3, epoch, 27)
            assert np.array_equal(order[row : row + batch // num_replicas], samples)


def test_reader_gives_the_rows_over_epochs(cache: LogitCache) -> None:
    """Batches of 8 leave nothing of 24 rows; those of 16 leave a third of them unread."""
    for epoch in range(3):
        cache.write_epoch(epoch, calls(epoch, []))
    for batch in (8, 16):
        steps = 24 // batch
        reader = CachedLogits(cache, CPU, last_epoch=2, rows_per_epoch=steps * batch)
        places = positions(
            start_step=1,
            steps_per_epoch=steps,
            global_batch_size=batch,
            num_replicas=batch // SIZE,
            rank=0,
            world_size=1,
        )
        num = (3 * steps - 1) * batch // SIZE
        for place in itertools.islice(places, num):
            assert torch.equal(reader.at(place), expected(place.epoch)[place.row : place.row + SIZE])
        assert place.epoch == 2


def test_reader_names_what_is_damaged_ahead(cache: LogitCache) -> None:
    for epoch in range(2):
        cache.write_epoch(epoch, calls(epoch, []))
    (cache.folder / "epoch-00001-00000.npy").write_bytes(b"")
    reader = CachedLogits(cache, CPU, last_epoch=1, rows_per_epoch=24)
    places = positions(start_step=0, steps_per_epoch=6, global_batch_size=SIZE, num_replicas=1, rank=0, world_size=1)
    for _ in range(6):
        reader.at(next(places))
    with pytest.raises(ValueError, match=r"epoch-00001-00000.npy are damaged"):
        reader.at(next(places))
