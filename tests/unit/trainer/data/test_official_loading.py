"""The official preprocessing from file to batch, against TensorFlow, and the same for both loaders
and any number of ranks.

tests/golden/official_jpeg.npz holds JPEG files and what tensorflow-cpu 2.21.0 makes of them in the
official evaluation: decode_and_crop_jpeg with its defaults on larq-zoo 2.4.0's central window, then
resize_bicubic; of size 224 every 16th row.
"""

import dataclasses
import hashlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, normalize, open_dataset

CPU = torch.device("cpu")

GOLDEN = dict(np.load(Path(__file__).parents[3] / "golden" / "official_jpeg.npz"))
FILES = [name for name in GOLDEN if name.startswith("jpeg")]
CONFIG = DataConfig(augmentation="random_resized_crop", preprocessing="official", num_threads=1, image_size=24)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        folder = tmp_path / "data" / split / "a"
        folder.mkdir(parents=True)
        for name in FILES:
            (folder / f"{name}.jpg").write_bytes(GOLDEN[name].tobytes())
    return tmp_path / "data"


@pytest.mark.parametrize("name", FILES)
def test_validation_has_the_bits_of_tensorflow(root: Path, name: str) -> None:
    size = int(name.rsplit("_", 1)[1])
    config = dataclasses.replace(CONFIG, root=str(root), image_size=size)
    (batch,) = ValidationLoader(open_dataset(config), config, rank=0, world_size=1, local_world_size=1, device=CPU)
    images, _ = batch
    assert images.dtype == torch.float32
    ours = images[FILES.index(name), :: 16 if size == 224 else 1].numpy()
    np.testing.assert_array_equal(ours, GOLDEN[f"resized_{name.split('_')[1]}"])


def test_the_other_loader_differs_by_its_jpeg_decoder(root: Path) -> None:
    """Pillow decodes with the accurate inverse transform, TensorFlow by default with the fast
    one."""
    batches = []
    for loader in ("dali", "torch"):
        config = dataclasses.replace(CONFIG, root=str(root), loader=loader)  # type: ignore[arg-type]
        (batch,) = ValidationLoader(open_dataset(config), config, rank=0, world_size=1, local_world_size=1, device=CPU)
        batches.append(batch[0])
    difference = (batches[0] - batches[1]).abs()
    assert 0 < difference.mean() < 2
    assert difference.max() < 40


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_training_batches_are_the_same_on_any_number_of_ranks(root: Path, loader: str) -> None:
    config = dataclasses.replace(CONFIG, root=str(root), loader=loader)  # type: ignore[arg-type]
    dataset = open_dataset(config)

    def digests(rank: int, world_size: int, count: int) -> list[str]:
        batches = TrainLoader(
            dataset,
            config,
            seed=1,
            global_batch_size=4,
            num_replicas=4,
            rank=rank,
            world_size=world_size,
            local_world_size=world_size,
            device=CPU,
        ).batches()
        return [hashlib.sha256(images.numpy().tobytes()).hexdigest() for images, _ in islice(batches, count)]

    whole = digests(0, 1, 4 * 6)
    assert len(set(whole)) > 20
    for world_size in (2, 4):
        share = 4 // world_size
        shares = [digests(rank, world_size, share * 6) for rank in range(world_size)]
        assert [d for step in range(6) for each in shares for d in each[step * share : (step + 1) * share]] == whole


def test_flips_mirror_the_resized_window(root: Path) -> None:
    flipped = dataclasses.replace(CONFIG, root=str(root))
    plain = dataclasses.replace(flipped, flip=False)
    dataset = open_dataset(plain)
    place = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": CPU}
    loaders = [TrainLoader(dataset, c, seed=1, global_batch_size=5, num_replicas=1, **place) for c in (flipped, plain)]
    seen = set()
    streams = zip(loaders[0].requests(), *(loader.batches() for loader in loaders), strict=True)
    for request, (ours, _), (unflipped, _) in islice(streams, 4):
        for index, mirrored in enumerate(request.flips.tolist()):
            assert torch.equal(ours[index], unflipped[index].flip(1) if mirrored else unflipped[index])
            seen.add(mirrored)
    assert seen == {0, 1}


def test_normalize_leaves_float_images_as_they_are() -> None:
    images = torch.rand(2, 4, 4, 3) * 300 - 20
    copy = images.clone()
    expected = (copy - 10) / 2
    assert torch.equal(normalize(images, (10.0,) * 3, (2.0,) * 3), expected.permute(0, 3, 1, 2))
    assert torch.equal(images, copy)


def test_official_preprocessing_is_of_random_resized_crops() -> None:
    with pytest.raises(ValueError, match=r"data\.preprocessing='official' .*data\.augmentation='random_resized_crop'"):
        DataConfig(preprocessing="official")
