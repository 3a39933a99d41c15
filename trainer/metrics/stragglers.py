"""Which rank holds the others up: the time that each spends on its own work, without what it waits for the others."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

SLOW_RATIO = 1.5
REPORTS_IN_A_ROW = 3


class OwnTime:
    """Seconds that this rank needs for loading, forward and backward; in what follows, ranks wait for each other.

    On a GPU the clock is that of its stream. With engine.sharding none and zero1 to zero3 DeepSpeed reduces inside of backward,
    so the waiting is in it and the ranks look alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._begun = 0.0
        self._num_steps = 0

    def begin(self) -> None:
        """A micro-batch begins."""
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        self._begun = time.perf_counter()

    def end(self) -> None:
        """Its backward is over."""
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._begun

    def end_step(self) -> None:
        """All micro-batches of an optimizer step are over."""
        self._num_steps += 1

    def read(self) -> float:
        """Seconds a step, since the last reading; on a GPU this waits for it."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        result = self._seconds / max(self._num_steps, 1)
        self._events, self._seconds, self._num_steps = [], 0.0, 0
        return result


class Spread(NamedTuple):
    """The slowest rank, and how the others do; seconds a step."""

    slowest_rank: int
    slowest_seconds: float
    median_seconds: float
    """Of all other ranks."""


def spread(seconds: Sequence[float]) -> Spread:
    """The spread over two or more ranks, from the seconds of each."""
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    others = [each for rank, each in enumerate(seconds) if rank != slowest]
    return Spread(slowest, seconds[slowest], statistics.median(others))


class StragglerWatch:
    """Says once that a rank is slow, when it has been for several reports in a row."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._rank, self._in_a_row = -1, 0

    def facts(self, seconds: Sequence[float], say: Callable[[str], None]) -> dict[str, Any]:
        """What the metrics say of the `seconds` of each rank; a straggler is also told to `say`."""
        if len(seconds) < 2:
            return {}
        found = spread(seconds)
        if sentence := self.report(found):
            say(sentence)
        return found._asdict() | {"slowest_host": self._hosts[found.slowest_rank]}

    def report(self, found: Spread) -> str:
        """A sentence when `found` makes a rank a straggler, else ""."""
        is_slow = found.slowest_seconds > SLOW_RATIO * found.median_seconds
        same = is_slow and found.slowest_rank == self._rank
        self._rank, self._in_a_row = found.slowest_rank, self._in_a_row + 1 if same else int(is_slow)
        if self._in_a_row != REPORTS_IN_A_ROW:
            return ""
        return (
            f"rank {found.slowest_rank} on {self._hosts[found.slowest_rank]} holds the others up: {found.slowest_seconds:.3f} s "
            f"a step for loading, forward and backward, {found.median_seconds:.3f} s on the median of the others"
        )
