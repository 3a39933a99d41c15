import dataclasses
from typing import Any, Literal

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.engine import compilation
from bitfleet.trainer.engine.compilation import is_compiled
from bitfleet.trainer.engine.config import EngineConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
Sharding = Literal["bits", "zero3"]


def config_of(compile: Literal["auto", "on", "off"], sharding: Sharding = "bits") -> TrainConfig:
    config = load_config("fashion_quickstart")
    model = dataclasses.replace(config.model, compile=compile)
    return dataclasses.replace(config, model=model, engine=EngineConfig(sharding=sharding))


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What two ranks find when they try to compile."""
    problems = ["", ""]
    monkeypatch.setattr(compilation, "problem_of_compiling", lambda device: problems)
    monkeypatch.setattr(compilation, "objects_from_ranks", lambda mine: mine)
    return problems


@pytest.mark.parametrize(
    ("compile", "device", "begun", "expected"),
    [
        ("auto", CPU, None, False),
        ("auto", GPU, None, True),
        ("on", CPU, None, True),
        ("off", GPU, None, False),
        ("auto", CPU, {"model.compile": "on"}, True),
        ("auto", GPU, {"model.compile": "off"}, False),
        ("auto", GPU, {"step": 7}, False),  # of a version that compiled nothing
        ("on", GPU, {"step": 7}, True),  # which the checkpoint then refuses
    ],
)
def test_what_auto_comes_to(
    compile: Literal["auto", "on", "off"], device: torch.device, begun: dict[str, Any] | None, expected: bool
) -> None:
    assert is_compiled(config_of(compile), device, begun) is expected


def test_zero3_takes_the_weights_apart() -> None:
    assert not is_compiled(config_of("auto", "zero3"), GPU, None)
    with pytest.raises(ValueError, match='model.compile on .*engine.sharding "zero3"'):
        config_of("on", "zero3")


def test_no_rank_compiles_where_one_cannot(ranks: list[str]) -> None:
    ranks[1] = "OSError: g++ not found"
    with pytest.warns(RuntimeWarning, match="eager .*rank 1 .*OSError: g\\+\\+ not found"):
        assert not is_compiled(config_of("on"), CPU, None)
