import dataclasses
from typing import Literal

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
    """Return what two ranks find when they try to compile."""
    problems = ["", ""]
    monkeypatch.setattr(compilation, "problem_of_compiling", lambda device: problems)
    monkeypatch.setattr(compilation, "all_gather_objects", lambda mine: mine)
    return problems


@pytest.mark.parametrize(
    ("compile", "device", "was_compiled", "expected"),
    [
        ("auto", CPU, None, False),
        ("auto", GPU, None, True),
        ("on", CPU, None, True),
        ("off", GPU, None, False),
        ("auto", CPU, True, True),
        ("auto", GPU, False, False),
        ("on", GPU, False, True),  # which the checkpoint then refuses
    ],
)
def test_what_auto_comes_to(
    compile: Literal["auto", "on", "off"], device: torch.device, was_compiled: bool | None, expected: bool
) -> None:
    assert is_compiled(compile, device, "bits", was_compiled) is expected


def test_zero3_takes_the_weights_apart() -> None:
    assert not is_compiled("auto", GPU, "zero3", None)
    with pytest.raises(ValueError, match="model.compile.*zero3"):
        config_of("on", "zero3")


def test_no_rank_compiles_where_one_cannot(ranks: list[str]) -> None:
    ranks[1] = "OSError: g++ not found"
    with pytest.warns(RuntimeWarning, match="eager torch, slower: rank 1 cannot compile: OSError: g\\+\\+ not found"):
        assert not is_compiled("on", CPU, "bits", None)
