"""Find the rank that holds the others up, by the time that each spends on its own work."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

SLOW_RATIO = 1.5
REPORTS_IN_A_ROW = 3


class Spread(NamedTuple):
    """Slowest rank and median of the others, in seconds per step."""

    slowest_rank: int
    slowest_seconds: float
    median_seconds: float
    """Median of all other ranks."""


def spread(seconds: Sequence[float]) -> Spread:
    """Return the spread over two or more ranks, from the seconds of each."""
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    others = [each for rank, each in enumerate(seconds) if rank != slowest]
    return Spread(slowest, seconds[slowest], statistics.median(others))


class StragglerWatch:
    """Reports once that a rank is slow, when it has been slow in several reports in a row."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._rank, self._in_a_row = -1, 0

    def facts(self, seconds: Sequence[float], log: Callable[[str], None]) -> dict[str, Any]:
        """Return what the metrics report of the `seconds` of each rank; a straggler is also told to
        `log`."""
        if len(seconds) < 2:
            return {}
        found = spread(seconds)
        if sentence := self.report(found):
            log(sentence)
        return found._asdict() | {"slowest_host": self._hosts[found.slowest_rank]}

    def report(self, found: Spread) -> str:
        """Return a sentence if `found` makes a rank a straggler, else ""."""
        is_slow = found.slowest_seconds > SLOW_RATIO * found.median_seconds
        same = is_slow and found.slowest_rank == self._rank
        self._rank, self._in_a_row = found.slowest_rank, self._in_a_row + 1 if same else int(is_slow)
        if self._in_a_row != REPORTS_IN_A_ROW:
            return ""
        return (
            f"rank {found.slowest_rank} on {self._hosts[found.slowest_rank]} holds the others up: "
            f"{found.slowest_seconds:.3f} s "
            f"per step for loading, forward and backward, {found.median_seconds:.3f} s on the median of the others"
        )
