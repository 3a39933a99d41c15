"""Read the flip journal of a run: flips over time and the age of the weights, per layer."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitfleet.launch.journal.reader import RankFile, read_parts, replay
from bitfleet.launch.report import drawing
from bitfleet.launch.report.page import Block, Table, picture
from bitfleet.launch.report.run_plots import TRAIN, draw_flips
from bitfleet.launch.report.run_results import RunResults
from bitfleet.launch.report.sweep_results import Curve
from bitfleet.trainer.journal.format import FOLDER

MAX_INTERVALS = 200
"""Intervals of steps over which flips are averaged."""
QUANTILES = (0.1, 0.5, 0.9)


class Journal(NamedTuple):
    """Flips of every layer, from the first step of a journal to its last one."""

    first_step: int
    last_step: int
    last_flips: dict[str, npt.NDArray[np.int64]]
    """Parameter -> step of the last flip per weight, int64 [numel]; `first_step` without a flip."""
    flips: dict[str, npt.NDArray[np.int64]]
    """Parameter -> number of flips per interval, int64 [intervals]."""
    interval: int
    """Steps per interval."""

    def ratios(self, *names: str) -> Curve:
        """Return the fraction of the weights of some parameters that flip per step, over the intervals."""
        flips = sum(self.flips[name] for name in names)
        ends = np.minimum(self.first_step + self.interval * np.arange(1, len(flips) + 1), self.last_step)
        steps = np.diff(ends, prepend=self.first_step)
        return Curve(tuple(ends), tuple(flips / steps / sum(self.last_flips[name].size for name in names)))


def read_journal(run: Path) -> Journal:
    """Replay the journal of a run; flips during a gap in it are not counted.

    Raises:
        ValueError: the journal cannot be read.
    """
    parts = [part for part in read_parts(run) if part.files]
    first, last = parts[0].begin_step, parts[-1].last_step
    interval = max(1, math.ceil((last - first) / MAX_INTERVALS))
    shapes = parts[0].files[0].layout.shapes
    last_flips = {name: np.full(math.prod(shape), first) for name, shape in shapes.items()}
    flips = {name: np.zeros(math.ceil((last - first) / interval), np.int64) for name in shapes}
    journal = Journal(first, last, last_flips, flips, interval)
    for part in parts:
        for file in part.files:
            _replay_into(journal, file, part.last_step)
    return journal


def _replay_into(journal: Journal, file: RankFile, last_step: int) -> None:
    before = None
    for step, signs in replay(file, last_step):
        changed = signs ^ (signs if before is None else before)
        touched = np.flatnonzero(changed)
        bits = np.flatnonzero(np.unpackbits(changed[touched], bitorder="little"))
        flipped = touched[bits >> 3] * 8 + (bits & 7)
        for piece in file.layout.pieces if flipped.size else ():
            low, high = np.searchsorted(flipped, (piece.low, piece.low + piece.numel))
            journal.last_flips[piece.name][flipped[low:high] - piece.low + piece.first] = step
            journal.flips[piece.name][(step - journal.first_step - 1) // journal.interval] += high - low
        before = signs.copy()


def journal_blocks(run: RunResults) -> list[Block]:
    """Return flips over time and age of the weights by the journal of a run, if it has one; the reason if it is damaged."""
    if not (run.path / FOLDER).is_dir():
        return []
    try:
        journal = read_journal(run.path)
    except ValueError as error:
        return [Block(heading="Flip journal", text=f"The flip journal cannot be read: {error}.")]
    order = list(run.layers("train", "flip_ratio"))  # of the model; the journal has that of the buckets
    names = sorted(journal.flips, key=lambda name: order.index(name) if name in order else len(order))
    span = journal.last_step - journal.first_step
    ages = {name: journal.last_step - journal.last_flips[name] for name in names}
    everything = np.concatenate(list(ages.values()))
    rows = [_row("all", everything, sum(map(np.sum, journal.flips.values())), span)]
    rows += [_row(name, ages[name], np.sum(journal.flips[name]), span) for name in names]
    text = (
        f"Steps {journal.first_step + 1:,} to {journal.last_step:,}. The age of a weight is the number of steps since its last "
        f"flip; without a flip in the journal it is {span:,}."
    )
    header = (
        "layer",
        "weights",
        "flips per weight",
        *(f"{part:.0%} are younger than" for part in QUANTILES),
        "never flipped, %",
    )
    table = Table(header=header, rows=tuple(rows), strong=frozenset({0}))
    flips = draw_flips(journal.ratios(*names), {name: journal.ratios(name) for name in names})
    return [
        *picture("Flip journal: flips over time", "journal-flips", flips, f"Means over {journal.interval} step(s)."),
        *picture("Flip journal: age of the weights", "journal-ages", _draw_ages(everything), text, table),
    ]


def _row(name: str, ages: npt.NDArray[np.int64], num_flips: int, span: int) -> tuple[str, ...]:
    quantiles = (f"{age:,.0f}" for age in np.quantile(ages, QUANTILES))
    return name, f"{ages.size:,}", f"{num_flips / ages.size:.3g}", *quantiles, f"{100 * np.mean(ages == span):.3g}"


def _draw_ages(ages: npt.NDArray[np.int64]) -> bytes:
    (axis,) = drawing.panels(1, width=8.6, height=3.2)
    oldest = int(ages.max())
    counts, edges = np.histogram(ages, bins=min(50, oldest + 1), range=(-0.5, oldest + 0.5))
    axis.stairs(counts / ages.size, edges, fill=True, color=TRAIN)
    drawing.percent(axis, 0.0, float(counts.max() / ages.size))
    drawing.title(axis, "steps since the last flip; the last bar holds the weights that never flipped")
    return drawing.png([axis])
