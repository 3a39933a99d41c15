"""What the benchmark of the diagnostics refuses before it starts."""

from typing import Any

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.bench import diagnostics as bench
from bitfleet.trainer.ranks.collectives import Ranks


class ShortRun:
    """A trainer of 30 steps that must not be started."""

    num_steps = 30

    def __init__(self, *_: Any) -> None:
        pass

    def start(self) -> None:
        pytest.fail("started")


@pytest.mark.usefixtures("process_group")
def test_run_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Trainer", ShortRun)
    config = load_config("fashion_quickstart")
    arguments = (config, Ranks(0, 1, 0, 1), torch.device("cpu"))
    with pytest.raises(ValueError, match="the run has 30 steps, the benchmark makes 40 of each loop: fewer --steps"):
        bench.bench_diagnostics(*arguments, num_rounds=3, num_steps=10)
    with pytest.raises(pytest.fail.Exception, match="started"):
        bench.bench_diagnostics(*arguments, num_rounds=2, num_steps=10)
