"""What loading costs, as numbers and as a table."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

BITFLEET = "bitfleet"
BITFLEET_SMALL = "bitfleet, files of 256 pixels"
TORCHVISION_UINT8 = "torchvision-v2-uint8"
TIMM = "timm create_loader, uint8"


class Turn(NamedTuple):
    """One contender in one round."""

    images_per_second: float
    cpu_ms: float
    """Milliseconds of all cores together for an image, user and system, of the process and its workers."""


class Result(NamedTuple):
    """What `bench_loader` measures."""

    num_images: int
    mean_kilobytes: float
    made_up: bool
    """The photos are made-up ones, not those of a data set."""
    batch_size: int
    num_workers: int
    turns: dict[str, list[Turn]]
    """A value a round for every contender, by title; those that are not installed have none."""
    sampler_ms: list[float]
    """CPU milliseconds for an image that order, windows, flips and paths take, a value a round; part of bitfleet's."""


def format_loader(result: Result) -> str:
    """The table, medians over the rounds with the least and the most, and the ratios that have a bound."""
    num_rounds = len(result.sampler_ms)
    kind = "made-up photos" if result.made_up else "photos"
    lines = [
        f"{result.num_images} {kind} of {result.mean_kilobytes:.0f} kB, batches of {result.batch_size}, "
        f"{result.num_workers} threads or workers, median of {num_rounds} rounds (least - most)",
        f"  {'':34}{'images/s':>24}{'CPU ms/image':>26}{'to bitfleet':>14}",
    ]
    for title, turns in result.turns.items():
        if not turns:
            lines.append(f"  {title:34}{'not installed':>24}")
            continue
        rate = _spread([turn.images_per_second for turn in turns], "{:,.0f}")
        cost = _spread([turn.cpu_ms for turn in turns], "{:.2f}")
        lines.append(f"  {title:34}{rate:>24}{cost:>26}{_ratio(result, title, BITFLEET):14.2f}")
    sampler = statistics.median(
        ms / turn.cpu_ms for ms, turn in zip(result.sampler_ms, result.turns[BITFLEET], strict=True)
    )
    gain = _ratio(result, BITFLEET_SMALL, BITFLEET, lambda turn: turn.images_per_second)
    lines += [
        f"  CPU ms, bitfleet / timm                              {_ratio(result, BITFLEET, TIMM):8.2f}  (at most 0.70)",
        f"  CPU ms, bitfleet / torchvision-v2-uint8              {_ratio(result, BITFLEET, TORCHVISION_UINT8):8.2f}  "
        "(at most 1.05)",
        f"  bitfleet's sampler, of its CPU time                  {sampler:8.2%}  (at most 1 %)",
        f"  images/s, files of 256 pixels / originals            {gain:8.2f}  (at least 1.8)",
        f"  CPU ms, originals / files of 256 pixels              {1 / _ratio(result, BITFLEET_SMALL, BITFLEET):8.2f}",
        "  Where other processes want the cores as well, images/s say little; CPU ms hold.",
    ]
    if result.made_up:
        lines.append(
            "  Made-up photos have the pixels, bytes and chroma of ImageNet's, as they are and at 256 pixels, and cost about\n"
            "  what those do: on another CPU real ones took torchvision-v2-uint8 1.6 times the decoder alone (--root takes them)."
        )
    return "\n".join(lines)


def _ratio(result: Result, above: str, below: str, number: Callable[[Turn], float] = lambda turn: turn.cpu_ms) -> float:
    pairs = zip(result.turns[above], result.turns[below], strict=True)
    return statistics.median(number(a) / number(b) for a, b in pairs)


def _spread(values: list[float], form: str) -> str:
    middle, least, most = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} - {most})"
