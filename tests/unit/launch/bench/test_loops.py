"""Benchmarks of training loops: what they refuse before they start, their ratios, and the bytes of
encoded flips."""

from typing import Any

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.bench import loops
from bitfleet.launch.bench.command import Diagnostics
from bitfleet.launch.bench.timing import Turn
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


def test_turns_are_compared() -> None:
    without = [Turn(seconds, 0.05) for seconds in (0.1, 0.2, 0.4)]
    with_it = [Turn(seconds, 0.06) for seconds in (0.11, 0.24, 0.4)]
    _, step, cpu = loops.compare_turns(without, with_it)
    assert step == ["ms", "200.00", "240.00", "1.1000", "1.050 to 1.150"]
    assert cpu == ["CPU ms of rank 0", "50.00", "60.00", "1.2000", "1.200 to 1.200"]


def test_encodings_are_near_the_entropy() -> None:
    rows = loops.encode_flips(1 << 20, (0.5, 0.03, 0.002))
    assert [row[0] for row in rows] == [0.5, 0.03, 0.002]
    for _, _, over_entropy, *_ in rows:
        assert 0.95 < over_entropy < 1.15
    assert rows[0][1] == pytest.approx((1 << 20) / 8, rel=0.01)
