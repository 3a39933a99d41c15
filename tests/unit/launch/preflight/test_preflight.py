"""Check what preflight counts and compares, by hand."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.preflight import rehearsal
from bitfleet.launch.preflight.preflight import Preflight
from bitfleet.launch.preflight.rehearsal import difference
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.ranks.collectives import Ranks

BINARY, OTHERS = 73_728, 4_314  # weights of fashion_small
BINARY_PADDED, OTHERS_PADDED = 73_728, 4_352  # to 64 per rank
NUM_STATISTICS = 2 * 3 * (16 + 32 + 64)  # means and variances of nine BatchNorms
NUM_TENSORS = 6 + 23


def preflight_of(world_size: int, num_replicas: int, **fields: str) -> Preflight:
    config = dataclasses.replace(load_config("fashion_small"), engine=EngineConfig(**fields))  # type: ignore[arg-type]
    trainer = SimpleNamespace(
        config=config,
        ranks=SimpleNamespace(world_size=world_size),
        num_replicas=num_replicas,
        sharded=None,
        compiled=False,
        device=torch.device("cpu"),
    )
    return Preflight(trainer)  # type: ignore[arg-type]


def test_traffic_is_the_formula_of_the_docs() -> None:
    def per_step(world_size: int, num_replicas: int | None = None, **fields: str) -> float | None:
        return preflight_of(world_size, num_replicas or world_size, **fields).sent_bytes

    assert per_step(1) == 0
    padded, plain = BINARY_PADDED + OTHERS_PADDED, BINARY + OTHERS
    weights = BINARY_PADDED / 8 + 4 * OTHERS_PADDED
    further = 2 * 4 * (2 + NUM_TENSORS) + 2 * 24  # what is agreed on before the update, and whether to stop
    statistics = 4 * NUM_STATISTICS
    assert per_step(4) == pytest.approx(3 / 4 * (4 * padded + weights + further + 4 * statistics))
    assert per_step(4, grad_comm_dtype="bf16") == pytest.approx(
        3 / 4 * (2 * padded + weights + further + 4 * statistics)
    )
    others = 48 + 2 * statistics
    assert per_step(2, sharding="none") == pytest.approx(1 / 2 * (8 * plain + others))
    assert per_step(2, sharding="zero1") == pytest.approx(1 / 2 * (12 * plain + others))
    assert per_step(2, 4, sharding="zero2") == pytest.approx(1 / 2 * (20 * plain + others))
    assert per_step(2, sharding="zero3") is None


@pytest.mark.parametrize(
    ("sharding", "num_ranks", "words"),
    [("bits", 1, "nothing is sent"), ("bits", 2, "each rank sends 0."), ("zero3", 2, "not known .* zero3")],
)
def test_report(sharding: str, num_ranks: int, words: str) -> None:
    traffic, time = preflight_of(num_ranks, num_ranks, sharding=sharding).report().splitlines()
    assert re.match(f"traffic: {words}", traffic)
    assert time.startswith("expected time: ")


def test_counting_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    preflight_of(2, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_difference_names_the_first_tensor() -> None:
    a = {"x": torch.ones(2), "y": torch.zeros(2)}
    assert difference(a, {name: tensor.clone() for name, tensor in a.items()}) is None
    assert difference(a, {"x": torch.ones(2)}) == "y is missing"
    assert difference(a, a | {"y": -torch.zeros(2)}) == "y differs"  # the sign of zero is a bit
    assert difference(a, a | {"x": torch.ones(3)}) == "x differs"


@pytest.mark.usefixtures("process_group")
def test_a_run_with_a_new_head_is_rehearsed_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[TrainConfig] = []

    def build(trial: TrainConfig, *_: object) -> None:
        built.append(trial)
        raise ValueError("seen")

    monkeypatch.setattr(rehearsal, "Trainer", build)
    start = {"init": Path("weights.npz"), "init_head": "new", "run_dir": tmp_path / "run"}
    config = dataclasses.replace(load_config("fashion_small"), **start)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="building the run failed: seen"):
        rehearsal.rehearse(config, Ranks(0, 1, 0, 1), torch.device("cpu"))
    assert built[0].init is None
