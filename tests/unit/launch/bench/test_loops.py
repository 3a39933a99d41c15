"""Benchmarks of training loops: what they refuse before they start, their ratios, and the bytes of
encoded flips."""

from typing import Any

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.bench import loops
from bitfleet.launch.bench.command import Diagnostics
from bitfleet.trainer.ranks.collectives import Ranks

CPU, ONE_RANK = torch.device("cpu"), Ranks(0, 1, 0, 1)


class ShortRun:
    """A trainer of 30 steps that must not be started."""

    num_steps = 30

    def __init__(self, *_: Any) -> None:
        pass

    def start(self) -> None:
        pytest.fail("started")


@pytest.mark.usefixtures("process_group")
def test_run_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "Trainer", ShortRun)
    config = load_config("fashion_quickstart")
    with pytest.raises(ValueError, match="30 steps.*40"):
        next(loops.bench_diagnostics(Diagnostics(rounds=3, steps=10), config, ONE_RANK, CPU))
    with pytest.raises(pytest.fail.Exception, match="started"):
        next(loops.bench_diagnostics(Diagnostics(rounds=2, steps=10), config, ONE_RANK, CPU))
    with pytest.raises(ValueError, match="--steps is 7.*10"):
        next(loops.bench_diagnostics(Diagnostics(steps=7), config, ONE_RANK, CPU))


def test_encodings_are_near_the_entropy() -> None:
    rows = loops.encode_flips(1 << 20, (0.5, 0.03, 0.002))
    assert [row["what"] for row in rows] == ["50.00% flip", "3.00% flip", "0.20% flip"]
    for row, bits_per_weight in zip(rows, (1.0, 0.1944, 0.0208), strict=True):
        assert 0.95 < row["bytes"] / (bits_per_weight * (1 << 20) / 8) < 1.15
