import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfleet.configs import load_config
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.sweep import slots as sweep_slots
from bitfleet.launch.sweep.slots import PROCESS_BYTES, Slots, bytes_of_largest, bytes_of_rank, find_slots
from bitfleet.models import create_model
from bitfleet.trainer.config import TrainConfig

GB = 10**9
MACHINE: dict[str, Any] = {"num_cores": 8, "free_memory": 100 * GB, "bytes_of_largest": GB, "visible_gpus": []}


@pytest.fixture
def slots_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Slots]:
    """Return the slots on a machine of 8 cores and 100 GB for runs that take 1 GB per rank, with
    some changes."""

    def find(*, ranks: int = 1, threads: int | None = None, at_once: int | None = None, **change: object) -> Slots:
        for name, value in (MACHINE | change).items():
            monkeypatch.setattr(sweep_slots, name, lambda *_, value=value: value)
        return find_slots([dataclasses.replace(load_config("fashion_small"), num_threads=threads)], ranks, at_once)

    return find


@pytest.mark.parametrize(
    ("change", "number", "threads"),
    [
        ({}, 8, 1),
        ({"ranks": 2}, 4, 1),
        ({"ranks": 2, "threads": 2}, 2, 2),
        ({"free_memory": 4 * GB}, 3, 1),  # a tenth stays free
        ({"free_memory": 4 * GB, "ranks": 2}, 1, 1),
        ({"num_cores": 1, "ranks": 2}, 1, 1),  # one run always fits
        ({"at_once": 3, "bytes_of_largest": 100 * GB}, 3, 1),
        ({"visible_gpus": ["0", "1", "2", "3"]}, 4, 2),
        ({"visible_gpus": ["4", "5", "6"], "ranks": 2}, 1, 2),
    ],
)
def test_as_many_as_fit(slots_on: Callable[..., Slots], change: dict[str, Any], number: int, threads: int) -> None:
    slots = slots_on(**change)
    assert (len(slots.environments), slots.threads) == (number, threads)


def test_each_run_has_its_own_gpus(slots_on: Callable[..., Slots]) -> None:
    slots = slots_on(visible_gpus=["4", "5", "6", "7"], ranks=2)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in slots.environments] == ["4,5", "6,7"]


@pytest.mark.parametrize("change", [{"ranks": 3}, {"at_once": 3}])
def test_too_few_gpus(slots_on: Callable[..., Slots], change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="3 GPUs.* 2"):
        slots_on(visible_gpus=["0", "1"], **change)


def test_memory_of_a_run_follows_its_batch() -> None:
    config = load_config("fashion_small")
    whole, half = (bytes_of_rank(config, ranks) - PROCESS_BYTES for ranks in (1, 2))
    assert 5e6 < half < 0.6 * whole < 60e6


def test_memory_is_an_upper_bound_of_a_step() -> None:
    """A forward and a backward keep less than the estimate; counted over every tensor that autograd
    saves."""
    config = load_config("fashion_small")
    model, saved = create_model(config.model), dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.zeros(config.global_batch_size, 3, config.data.image_size, config.data.image_size)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(images).sum()
    assert 1e6 < sum(saved.values()) < bytes_of_rank(config, 1) - PROCESS_BYTES


def test_images_that_are_too_small_for_the_network_are_one_sentence() -> None:
    config = load_config("binarynet_cifar10")
    with pytest.raises(ValueError, match="binarynet .*8"):
        bytes_of_rank(dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=8)), 1)


def test_memory_is_that_of_the_largest_run_and_equal_ones_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        "",
        "--optim.rule bop",
        "--optim.rule latent_adam",
        "--optim.gamma.start 1e-5",
        "--seed 3",
        "--model.norm none",
    )
    configs = [parse_train(["--config", "fashion_small", *words.split()], "t") for words in options]
    estimated: list[TrainConfig] = []

    def noted(config: TrainConfig, ranks: int) -> int:
        estimated.append(config)
        return bytes_of_rank(config, ranks)

    monkeypatch.setattr(sweep_slots, "bytes_of_rank", noted)
    largest = bytes_of_largest(configs, 1)
    assert len(estimated) == 4
    assert largest == bytes_of_rank(configs[2], 1) > bytes_of_rank(configs[0], 1)
