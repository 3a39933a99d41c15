"""The slowest rank, and when it is said."""

import pytest
import torch

from bitfleet.trainer.metrics.step_observer import ComputeTimer
from bitfleet.trainer.metrics.stragglers import Spread, StragglerWatch, spread


def test_spread_names_the_slowest_of_the_ranks() -> None:
    assert spread([0.1, 0.2, 0.9, 0.3]) == Spread(2, 0.9, 0.2)
    assert spread([0.4, 0.2]) == Spread(0, 0.4, 0.2)


def test_straggler_is_said_once_after_three_reports_in_a_row() -> None:
    watch = StragglerWatch(["a", "a", "b", "b"])
    slow, other, even = Spread(2, 0.4, 0.2), Spread(1, 0.4, 0.2), Spread(2, 0.29, 0.2)
    said = [watch.report(each) for each in (slow, slow, even, slow, slow, other, slow, slow, slow, slow)]
    assert [bool(each) for each in said] == [False] * 8 + [True, False]
    assert said[8] == (
        "rank 2 on b holds the others up: 0.400 s per step for loading, forward and backward, 0.200 s on the "
        "median of the others"
    )


def test_own_time_is_what_lies_between_begin_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("bitfleet.trainer.metrics.step_observer.time.perf_counter", lambda: now)
    clock = ComputeTimer(torch.device("cpu"))
    for _ in range(2):
        for _ in range(2):
            clock.begin()
            now += 1.0
            clock.end()
            now += 100.0
        clock.end_step()
    assert clock.read() == 2.0
    assert clock.read() == 0.0


class Event:
    """As torch.cuda.Event, whose clock is `now` and which refuses what was not recorded."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        if self.at is None or end.at is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1000 * (end.at - self.at)


def test_a_graphed_step_loads_all_its_micro_batches_before_their_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = ComputeTimer(torch.device("cuda"))
    for _ in range(2):
        for _ in range(3):
            clock.begin()
            Event.now += 1.0
        clock.end()
        Event.now += 100.0
        clock.end_step()
    assert clock.read() == 3.0
