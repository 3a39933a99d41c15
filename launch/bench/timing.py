"""Time contenders in turns: interleaved rounds, and ratios round by round."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from bitfleet.trainer.ranks.collectives import barrier

K = TypeVar("K")
T = TypeVar("T")


class Turn(NamedTuple):
    """One contender in one round."""

    seconds: float
    """Seconds per step."""
    cpu_seconds: float
    """CPU time per step of all threads of this process, which other jobs hardly change."""


def interleave(contenders: Mapping[K, Callable[[], T]], num_rounds: int, warm_up: int = 1) -> dict[K, list[T]]:
    """Call every contender once per round, in an order that rotates, and return what each returned.

    The first `warm_up` rounds do not count.
    """
    titles = list(contenders)
    results: dict[K, list[T]] = {title: [] for title in titles}
    for count in range(warm_up + num_rounds):
        first = count % len(titles)
        for title in titles[first:] + titles[:first]:
            result = contenders[title]()
            if count >= warm_up:
                results[title].append(result)
    return results


def take_turn(
    step: Callable[[], object], num_steps: int, device: torch.device, finish: Callable[[], object] | None = None
) -> Turn:
    """Time `num_steps` calls of `step`, and one of `finish`, between barriers of all ranks."""
    barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        step()
    if finish is not None:
        finish()
    synchronize(device)
    cpu_seconds = time.process_time() - cpu_start
    barrier()
    return Turn((time.perf_counter() - start) / num_steps, cpu_seconds / num_steps)


def seconds_per_call(run: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Return the mean seconds of `num_calls` calls in a row, in one process."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / num_calls


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Divide two series round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio of two series."""
    return statistics.median(ratios(numerators, denominators))
