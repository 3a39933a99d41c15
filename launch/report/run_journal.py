"""Replay the flip journal of a run: flips over time and the last flip of every weight, per
layer."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitfleet.launch.journal.reader import RankFile, read_parts, replay
from bitfleet.launch.report.sweep_results import Curve

MAX_INTERVALS = 200
"""Intervals of steps over which flips are averaged."""


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
        """Return the fraction of the weights of some parameters that flip per step, over the
        intervals."""
        flips = np.sum([self.flips[name] for name in names], axis=0)
        ends = np.minimum(self.first_step + self.interval * np.arange(1, len(flips) + 1), self.last_step)
        steps = np.diff(ends, prepend=self.first_step)
        return Curve(tuple(ends), tuple(flips / steps / sum(self.last_flips[name].size for name in names)))


def read_journal(run: Path) -> Journal:
    """Replay the journal of a run; flips during a gap in it are not counted.

    Raises:
        ValueError: the journal cannot be read, or no step of it.
    """
    written = [part for part in read_parts(run) if part.files]
    parts = [part for part in written if part.last_step >= part.begin_step]
    if not parts:
        raise ValueError(written[0].gap or "no step is complete")
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
