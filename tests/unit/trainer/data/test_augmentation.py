"""Augmentation after the crop: against the published code and timm, and on any number of ranks."""

import dataclasses
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, rand_augment_transform

from bitfleet.trainer.data import DataConfig, Dataset, TrainLoader, ValidationLoader, open_dataset, sampler
from bitfleet.trainer.data.augmentation import RandAugment, darker, lighting_shifts, random_directions

CPU = torch.device("cpu")
PLAIN = DataConfig(num_threads=1, loader="torch")
BOTH = {"mixup": 0.2, "cutmix": 1.0}
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFLEET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield open_dataset(PLAIN)


def batches(
    dataset: Dataset, config: DataConfig, count: int = 4, *, rank: int = 0, world_size: int = 1, start_step: int = 0
) -> Batches:
    """Micro-batches of 30 images, two per step; an epoch has 100 steps."""
    loader = TrainLoader(
        dataset,
        config,
        seed=7,
        global_batch_size=60,
        num_replicas=2,
        rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        device=CPU,
    )
    return list(islice(loader.batches(start_step), count))


def first_samples(dataset: Dataset) -> np.ndarray:
    return sampler.epoch_permutation(7, 0, len(dataset.train))[:30]


def published_lighting(image: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """ReActNet, utils/utils.py, class Lighting with alphastd 0.1, from these normal numbers."""
    eigenvalues = np.asarray([0.2175, 0.0188, 0.0045])
    eigenvectors = np.asarray([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    scaled = (normals * 0.1).astype("float32") * eigenvalues
    sums = np.dot(eigenvectors, scaled.reshape(3, 1)).reshape(3)
    return np.clip(np.add(image, sums), 0, 255).astype(np.uint8)


def test_lighting_is_reactnets_truncation() -> None:
    normals = np.random.default_rng(0).standard_normal((200, 3))
    image = np.random.default_rng(1).integers(0, 256, (200, 5, 4, 3), np.uint8)
    image[:, 0, :2] = [[0, 0, 0], [255, 255, 255]]
    shifts = lighting_shifts(normals)
    assert len({tuple(row) for row in shifts.tolist()}) >= 6
    ours = darker(torch.from_numpy(image), torch.from_numpy(shifts)).numpy()
    for index in range(200):
        assert np.array_equal(ours[index], published_lighting(image[index], normals[index]))


def test_directions_give_the_patterns_of_normal_numbers() -> None:
    count = 40_000
    normals = np.random.default_rng(0).standard_normal((count, 3))
    drawn = random_directions(7, 1, np.arange(count))
    weights = np.array([4, 2, 1])
    expected, found = (np.bincount(lighting_shifts(each) @ weights, minlength=8) / count for each in (normals, drawn))
    assert np.abs(expected - found).max() < 0.01
    assert found.min() > 0.001
    assert not np.array_equal(drawn, random_directions(7, 2, np.arange(count)))
    assert np.array_equal(drawn[10:20], random_directions(7, 1, np.arange(10, 20)))


@pytest.mark.parametrize("loader", ["torch", "dali", "memory"])
def test_every_loader_lights_the_same_images(fashion: Dataset, loader: Any) -> None:
    config = dataclasses.replace(PLAIN, loader=loader)
    (plain, labels), (lit, same) = (
        batches(fashion, dataclasses.replace(config, color_lighting=on), 1)[0] for on in (False, True)
    )
    shifts = lighting_shifts(random_directions(7, 0, first_samples(fashion))).astype(int)
    expected = np.maximum(plain.numpy().astype(int) - shifts[:, None, None], 0)
    assert np.array_equal(lit.numpy(), expected)
    assert shifts.any()
    assert torch.equal(labels, same)


@pytest.mark.parametrize(
    "options", [{"color_lighting": True}, BOTH, {"rand_augment": "rand-m9-mstd0.5"}, {"mixup": 1.0, "flip": False}]
)
def test_any_number_of_ranks_and_a_resumed_run_see_the_same_images(fashion: Dataset, options: dict[str, Any]) -> None:
    config = dataclasses.replace(PLAIN, **options)
    whole = batches(fashion, config, 8, start_step=98)  # into the next epoch
    shares = [batches(fashion, config, 4, rank=rank, world_size=2, start_step=98) for rank in range(2)]
    resumed = batches(fashion, config, 2, start_step=101)
    joined = [share[step] for step in range(4) for share in shares]
    for there, here in zip([*whole, *whole[6:]], [*joined, *resumed], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


def seed_globally(key: int) -> None:
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])  # noqa: NPY002  (timm draws from it)


@pytest.fixture
def global_generators() -> Iterator[None]:
    """They are as before afterwards."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])  # noqa: NPY002


@pytest.mark.usefixtures("global_generators")
def test_mixing_is_timms(fashion: Dataset) -> None:
    mixed = batches(fashion, dataclasses.replace(PLAIN, **BOTH), 6)
    plain = batches(fashion, PLAIN, 6)
    order = sampler.epoch_permutation(7, 0, len(fashion.train))
    cut = 0
    for index, ((images, shares), (before, labels)) in enumerate(zip(mixed, plain, strict=True)):
        seed_globally(int(sampler.keys(7, 0, sampler.MIX, order[30 * index : 30 * index + 1])[0]))
        there, targets = Mixup(0.2, 1.0, label_smoothing=0.0, num_classes=10)(
            before.float().permute(0, 3, 1, 2).clone(), labels
        )
        assert torch.equal(images.permute(0, 3, 1, 2), there)
        assert torch.equal(shares, targets)
        assert shares.sum(1).numpy() == pytest.approx(1.0)
        assert images.dtype == shares.dtype == torch.float32
        cut += bool(torch.equal(images, images.round()))
    assert 0 < cut < 6, "both kinds occur"


@pytest.mark.usefixtures("global_generators")
def test_rand_augment_is_timms_and_leaves_the_global_generators_alone() -> None:
    augment = RandAugment("rand-m9-n3-mstd1.0-inc1", image_size=40, mean=(100.4, 50.0, 25.0), seed=3)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    before, changed = random.getstate(), 0
    for sample in range(12):
        ours = augment(Image.fromarray(pixels), 5, sample)
        assert random.getstate() == before
        seed_globally(int(sampler.keys(3, 5, sampler.RAND_AUGMENT, np.array([sample]))[0]))
        options = {"translate_const": 18, "img_mean": (100, 50, 25)}
        there = rand_augment_transform("rand-m9-n3-mstd1.0-inc1", options)(Image.fromarray(pixels))
        random.setstate(before)
        assert np.array_equal(np.asarray(ours), np.asarray(there))
        changed += not np.array_equal(np.asarray(ours), pixels)
    assert changed > 6


@pytest.mark.parametrize("num_threads", [1, 4])
def test_rand_augment_works_on_flipped_training_crops_alone(fashion: Dataset, num_threads: int) -> None:
    config = dataclasses.replace(PLAIN, num_threads=num_threads, rand_augment="rand-m9-mstd0.5")
    (images, _), (plain, _) = batches(fashion, config, 1)[0], batches(fashion, PLAIN, 1)[0]
    augment = RandAugment("rand-m9-mstd0.5", image_size=32, mean=PLAIN.mean, seed=7)
    for image, before, sample in zip(images, plain, first_samples(fashion).tolist(), strict=True):
        expected = augment(Image.fromarray(before.numpy()), 0, sample)
        assert np.array_equal(image.numpy(), np.asarray(expected))
    place = {"rank": 0, "world_size": 1, "local_world_size": 1, "device": CPU}
    validation = [next(iter(ValidationLoader(fashion, each, **place)))[0] for each in (config, PLAIN)]  # type: ignore[arg-type]
    assert torch.equal(*validation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -0.1}, r"data\.mixup=-0\.1 must be finite and not negative"),
        ({"cutmix": float("inf")}, r"data\.cutmix=inf"),
        ({"label_smoothing": 1.0}, r"data\.label_smoothing=1\.0 must be in \[0, 1\)"),
        ({"rand_augment": "rand-m9"}, r"data\.rand_augment .* needs data\.loader='torch', not 'dali'"),
        (
            {"color_lighting": True, "preprocessing": "official", "augmentation": "random_resized_crop"},
            r"data\.color_lighting .* needs data\.preprocessing='torchvision'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_bad_rand_augment_and_odd_micro_batches_are_refused(fashion: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.rand_augment='rand-x9' is not a RandAugment of timm"):
        batches(fashion, dataclasses.replace(PLAIN, rand_augment="rand-x9"))
    with pytest.raises(ValueError, match=r"data\.mixup and data\.cutmix mix pairs of images, and a micro-batch has 3,"):
        TrainLoader(
            fashion,
            dataclasses.replace(PLAIN, mixup=0.2),
            seed=0,
            global_batch_size=3,
            num_replicas=1,
            rank=0,
            world_size=1,
            local_world_size=1,
            device=CPU,
        )
