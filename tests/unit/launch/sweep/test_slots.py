from typing import Any

import pytest

from bitfleet.configs import load_config
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.sweep import slots as sweep_slots
from bitfleet.launch.sweep.slots import PROCESS_BYTES, bytes_of_largest, bytes_of_rank, find_slots
from bitfleet.trainer.config import TrainConfig

GB = 10**9
MACHINE: dict[str, Any] = {
    "ranks": 1,
    "threads": None,
    "at_once": None,
    "cores": 8,
    "free_bytes": 100 * GB,
    "rank_bytes": GB,
    "gpus": (),
}


@pytest.mark.parametrize(
    ("change", "number", "threads"),
    [
        ({}, 8, 1),
        ({"ranks": 2}, 4, 1),
        ({"ranks": 2, "threads": 2}, 2, 2),
        ({"free_bytes": 4 * GB}, 3, 1),  # a tenth stays free
        ({"free_bytes": 4 * GB, "ranks": 2}, 1, 1),
        ({"cores": 1, "ranks": 2}, 1, 1),  # it must go on somehow
        ({"at_once": 3}, 3, 1),
        ({"gpus": ("0", "1", "2", "3")}, 4, 2),
        ({"gpus": ("4", "5", "6"), "ranks": 2}, 1, 2),
    ],
)
def test_as_many_as_fit(change: dict[str, Any], number: int, threads: int) -> None:
    slots = find_slots(**MACHINE | change)
    assert (len(slots.environments), slots.threads) == (number, threads)


def test_each_run_has_its_own_gpus() -> None:
    slots = find_slots(**MACHINE | {"gpus": ("4", "5", "6", "7"), "ranks": 2})
    assert [each["CUDA_VISIBLE_DEVICES"] for each in slots.environments] == ["4,5", "6,7"]


@pytest.mark.parametrize("change", [{"ranks": 3}, {"at_once": 3}])
def test_too_few_gpus(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need 3 GPUs, and there are 2"):
        find_slots(**MACHINE | {"gpus": ("0", "1")} | change)


def test_memory_of_a_run_follows_its_batch() -> None:
    config = load_config("fashion_small")
    whole, half = (bytes_of_rank(config, ranks) - PROCESS_BYTES for ranks in (1, 2))
    assert 5e6 < half < 0.6 * whole < 30e6


def test_memory_is_that_of_the_largest_run_and_a_network_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        "",
        "--optim.rule bop",
        "--optim.rule latent_adam",
        "--optim.gamma.start 1e-5",
        "--seed 3",
        "--model.norm none",
    )
    configs = [parse_train(["--config", "fashion_small", *each.split()], "t") for each in options]
    built: list[TrainConfig] = []

    def noted(config: TrainConfig, ranks: int) -> int:
        built.append(config)
        return bytes_of_rank(config, ranks)

    monkeypatch.setattr(sweep_slots, "bytes_of_rank", noted)
    largest = bytes_of_largest(configs, 1)
    assert [(each.optim.rule, each.model.norm) for each in built] == [("latent_adam", "batch"), ("bop2ndorder", "none")]
    assert largest == max(bytes_of_rank(config, 1) for config in configs) > bytes_of_rank(configs[1], 1)
