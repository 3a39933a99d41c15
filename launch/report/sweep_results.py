"""A sweep: its runs, grouped into points."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitfleet.launch.report.statistics import Spread, spread

CURVES = {"top1": "step", "loss": "step", "train_loss": "train_step", "flip_ratio": "train_step"}
"""Curve -> the curve that holds its steps."""
Label = str | float
Labels = tuple[tuple[str, Label], ...]
"""(axis, value) of the axes that a point sets."""


class Curve(NamedTuple):
    """A number over the optimizer steps."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SweepRun:
    """One row: a point with a seed."""

    name: str
    status: str
    seed: str
    labels: Labels
    end: Mapping[str, float]
    """Last values; accuracies are fractions."""
    best_top1: float
    seconds: float
    error: str
    curves: Mapping[str, Curve]

    @property
    def counts(self) -> bool:
        """Whether it has a result."""
        return self.status == "finished" and math.isfinite(self.end.get("top1", math.nan))


@dataclasses.dataclass(frozen=True, slots=True)
class SweepPoint:
    """All seeds of one point."""

    labels: Labels
    name: str
    """What tells it from the other points."""
    finished: tuple[SweepRun, ...]
    others: tuple[SweepRun, ...]
    """Failed and pending."""

    def get(self, axis: str) -> Label | None:
        """The value on `axis`; None where it does not set it."""
        return dict(self.labels).get(axis)

    def without(self, *axes: str) -> Labels:
        """The labels on all other axes."""
        return tuple((axis, value) for axis, value in self.labels if axis not in axes)

    def end(self, key: str) -> Spread | None:
        """Last values of `key` over the seeds."""
        return spread([run.end.get(key, math.nan) for run in self.finished])

    @property
    def top1(self) -> Spread | None:
        """Last top-1 of validation over the seeds; None if no run finished."""
        return self.end("top1")


@dataclasses.dataclass(frozen=True, slots=True)
class SweepResults:
    """A sweep and its runs."""

    path: Path
    name: str
    title: str
    question: str
    base: str
    axes: tuple[str, ...]
    points: tuple[SweepPoint, ...]
    centre: Labels | None
    """Labels from which every point differs on one axis at most; None where there are none, or only one axis varies."""
    facts: Mapping[str, Any]
    """Further content of sweep.json."""

    @property
    def ranked(self) -> list[SweepPoint]:
        """Points with a result, the best first."""
        found = [(point.top1.mean, -number, point) for number, point in enumerate(self.points) if point.top1]
        return [point for _, _, point in sorted(found, key=lambda each: each[:2], reverse=True)]

    @property
    def unfinished(self) -> list[SweepRun]:
        """Failed and pending runs."""
        return [run for point in self.points for run in point.others]

    def is_numeric(self, axis: str) -> bool:
        """Whether all values on `axis` are numbers."""
        return all(not isinstance(point.get(axis), str) for point in self.points)


def show(value: Label) -> str:
    """`value` as a reader wants it: 1e-4 rather than 0.0001 or 1e-04."""
    if isinstance(value, str):
        return value
    if 0.0 < abs(value) < 0.01 or abs(value) >= 1e5:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def group(runs: Sequence[SweepRun], axes: Sequence[str]) -> tuple[SweepPoint, ...]:
    """The points of `runs`: the centre first, then by axis; words in the order in which they come, numbers ascending."""
    groups: dict[Labels, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.labels, []).append(run)
    first = {value: number for number, value in reversed(list(enumerate(v for key in groups for v in key)))}
    centre = centre_of(groups)

    def place(labels: Labels) -> list[tuple[bool, float]]:
        values = [(axis, dict(labels).get(axis)) for axis in axes]
        numbers = [first[axis, value] if isinstance(value, str) else value or 0.0 for axis, value in values]
        # With a centre, a point stands with those that differ from it on the same axis.
        away = [(value is None if centre is None else (axis, value) in centre) for axis, value in values]
        return [(labels != centre and bool(labels), 0.0), *zip(away, numbers, strict=True)]

    varied = {axis for axis in axes if len({dict(labels).get(axis) for labels in groups}) > 1}
    return tuple(
        SweepPoint(
            labels=labels,
            name=_name(labels, centre, varied, groups),
            finished=tuple(run for run in groups[labels] if run.counts),
            others=tuple(run for run in groups[labels] if not run.counts),
        )
        for labels in sorted(groups, key=place)
    )


def centre_of(points: Collection[Labels]) -> Labels | None:
    """The labels from which all `points` differ on one axis at most, where at least two axes vary so; else None."""
    for centre in points:
        away = [set(labels) - set(centre) for labels in points if {axis for axis, _ in labels} == dict(centre).keys()]
        if len(away) == len(points) and all(len(each) <= 1 for each in away):
            axes = {axis for each in away for axis, _ in each}
            return centre if len(axes) > 1 else None
    return None


def _name(labels: Labels, centre: Labels | None, varied: Collection[str], among: Collection[Labels]) -> str:
    """What `labels` differ in; words stand alone where no two axes share one."""
    if centre is not None and labels != centre:
        return ", ".join(f"{axis} {show(value)}" for axis, value in labels if (axis, value) not in centre)
    owners: dict[Label, set[str]] = {}
    for axis, value in (label for each in among for label in each):
        owners.setdefault(value, set()).add(axis)
    parts = [
        value if isinstance(value, str) and len(owners[value]) == 1 else f"{axis} {show(value)}"
        for axis, value in labels
        if axis in varied
    ]
    return ", ".join(parts) or "as configured"
