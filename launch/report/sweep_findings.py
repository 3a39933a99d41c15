"""Find the results of a sweep: the best point, convergence, robustness, tables of two axes."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

from bitfleet.configs.sweeps.sweep import Label
from bitfleet.launch.report.intervals import Plateau, Spread, plateau, plus_minus, spread, steps_to, welch
from bitfleet.launch.report.sweep_results import SweepPoint, SweepResults, mean_top1

Key = TypeVar("Key", bound=Hashable)
LEVELS = (0.80, 0.90, 0.95)
"""Fractions of the accuracy of the best point to which convergence is measured."""


class Slope(NamedTuple):
    """Accuracy along one axis; the other axes are those of the best point with at least three
    values on this one."""

    axis: str
    group: str
    """Words on the other axes, as the rule; "" without any."""
    points: tuple[SweepPoint, ...]
    """Points with a positive value on the axis, ascending."""
    zero: SweepPoint | None
    """Point with the value 0, which a logarithm does not show."""
    region: Plateau
    """Good region of the means over the seeds."""
    decades_of_seeds: tuple[float, ...]
    """Width of the region for each seed alone."""


class Grid(NamedTuple):
    """Points over two axes, with equal labels on the others."""

    x_axis: str
    y_axis: str
    x_values: list[Label]
    y_values: list[Label]
    cells: dict[tuple[Label | None, Label | None], SweepPoint]
    rest: str
    """The labels on the other axes."""


class Speed(NamedTuple):
    """Steps of the seeds of a point to an accuracy."""

    level: float
    reached: tuple[float, ...]
    """Steps of the seeds that reach it."""
    num: int
    """Number of seeds."""

    @property
    def steps(self) -> Spread | None:
        """Spread over the seeds that reach it."""
        return spread(self.reached)


def answer(results: SweepResults) -> list[str]:
    """Return the result of a sweep in two to four sentences."""
    best, *rest = results.ranked
    top1 = best.top1
    assert top1 is not None
    seeds = f"mean ± standard deviation of {top1.num} seeds" if top1.num > 1 else "one seed"
    sentences = [f"Best: {best.name} with {plus_minus(top1)} % top-1 ({seeds})."]
    if rest:
        sentences.append(_against_next(best, rest[0]))
    if len(rest) > 1:
        sentences.append(_num_indistinguishable(best, rest))
    failed, pending = (sum(run.status == status for run in results.runs) for status in ("failed", "pending"))
    if failed or pending:
        parts = [f"{number} {word}" for number, word in ((failed, "failed"), (pending, "not run yet")) if number]
        sentences.append(f"Incomplete: of {len(results.runs)} runs {' and '.join(parts)}.")
    return sentences


def _against_next(best: SweepPoint, second: SweepPoint) -> str:
    text = f"Next: {second.name} with {plus_minus(second.top1)} %"
    points = 100 * (mean_top1(best) - mean_top1(second))
    difference = welch(best.values("top1"), second.values("top1"))
    if difference is None:
        return f"{text}, {points:.1f} points behind; a spread needs at least two seeds of each."
    interval = f"95 % interval {100 * difference.low:+.2f} to {100 * difference.high:+.2f}, Welch"
    verdict = "more" if difference.is_clear else "no more"
    text += f"; the difference of {points:.1f} points ({interval})"
    return f"{text} is {verdict} than the spread over the seeds explains."


def _num_indistinguishable(best: SweepPoint, rest: Sequence[SweepPoint]) -> str:
    tests = [test for point in rest if (test := welch(best.values("top1"), point.values("top1")))]
    number = sum(not difference.is_clear for difference in tests)
    alone = "each compared alone; the best of many looks better than it is"
    if not tests:
        return f"{len(rest) + 1} points were tried."
    if not number:
        return f"All {len(tests)} other points with a spread are clearly below the best ({alone})."
    return f"Of the {len(tests)} other points with a spread, {number} cannot be distinguished from the best ({alone})."


def levels(results: SweepResults) -> list[float]:
    """Return the accuracies of convergence: whole percents near 80, 90, 95 % of the best
    point's."""
    best = mean_top1(results.ranked[0])
    return sorted({math.floor(100 * part * best) / 100 for part in LEVELS} - {0.0})


def speeds(point: SweepPoint, accuracies: Sequence[float]) -> list[Speed]:
    """Return the steps to each of `accuracies`, up to the first validation that reaches it."""
    curves = [run.curves["top1"] for run in point.finished if run.curves["top1"].steps]
    reached = [[steps_to(*curve, level) for curve in curves] for level in accuracies]
    return [
        Speed(level, tuple(step for step in steps if step is not None), len(curves))
        for level, steps in zip(accuracies, reached, strict=True)
    ]


def fastest(results: SweepResults) -> str:
    """Return a sentence on the first point at the highest level; "" if no point reaches it with all
    seeds."""
    level = levels(results)[-1:]
    to_level = [(speeds(point, level)[0], point) for point in results.ranked] if level else []
    complete = [(speed, point) for speed, point in to_level if speed.num and len(speed.reached) == speed.num]
    if not complete:
        return ""
    speed, point = min(complete, key=lambda pair: sum(pair[0].reached) / len(pair[0].reached))
    never = sum(speed.num > len(speed.reached) for speed, _ in to_level)
    text = f"First to {100 * level[0]:.0f} % top-1: {point.name}, after {plus_minus(speed.steps, 1.0, 0)} steps"
    return f"{text}; {never} of {len(to_level)} points have seeds that never reach it." if never else f"{text}."


def slopes(results: SweepResults) -> list[Slope]:
    """Return the accuracy along the axes of the figure's `robustness`, for each combination of
    words on the others."""
    lines = []
    for axis in results.figure.robustness:
        having = [point for point in results.points if isinstance(point.get(axis), float | int)]
        for words, group in _by(having, _words):
            line = _best_line(group, axis)
            positive = [point for point in line if _at(point, axis) > 0]
            region = _region(positive, axis) if positive else None
            if region is None:
                continue
            zero = next((point for point in line if _at(point, axis) == 0), None)
            seeds = sorted({run.seed for point in positive for run in point.finished})
            widths = [of_seed.decades for seed in seeds if (of_seed := _region(positive, axis, seed))]
            lines.append(Slope(axis, words, tuple(positive), zero, region, tuple(widths)))
    return lines


def _best_line(group: Sequence[SweepPoint], axis: str) -> list[SweepPoint]:
    """Return the best line of points that differ on `axis` alone, ascending, with three positive
    values.

    Around a centre, the best point is on one axis, and the lines along the others go through the
    centre.
    """
    for best in sorted((point for point in group if point.top1), key=mean_top1, reverse=True):
        line = [point for point in group if point.without(axis) == best.without(axis)]
        if sum(_at(point, axis) > 0 for point in line) >= 3:
            return sorted(line, key=lambda point: _at(point, axis))
    return []


def _region(points: Sequence[SweepPoint], axis: str, seed: str | None = None) -> Plateau | None:
    top1 = [spread(point.values("top1", seed)) for point in points]
    return plateau([_at(point, axis) for point in points], [mean.mean if mean else None for mean in top1])


def grids(results: SweepResults) -> list[Grid]:
    """Return the tables of the figure's `grids`, for the other settings that fill most cells."""
    tables = []
    for x_axis, y_axis in results.figure.grids:
        both = [point for point in results.points if None not in (point.get(x_axis), point.get(y_axis))]
        groups = _by(both, lambda point: point.without(x_axis, y_axis))  # noqa: B023 (used at once)
        most = max((len(group) for _, group in groups), default=0)
        for rest, group in groups:
            if len(group) == most:
                cells = {(point.get(x_axis), point.get(y_axis)): point for point in group}
                columns = [value for value in results.axes[x_axis] if value in {x for x, _ in cells}]
                rows = [value for value in results.axes[y_axis] if value in {y for _, y in cells}]
                name = ", ".join(f"{axis} {results.word(value)}" for axis, value in rest)
                tables.append(Grid(x_axis, y_axis, columns, rows, cells, name))
    return tables


def _words(point: SweepPoint) -> str:
    return ", ".join(value for _, value in point.labels if isinstance(value, str))


def _at(point: SweepPoint, axis: str) -> float:
    return float(point.get(axis) or 0.0)


def _by(points: Sequence[SweepPoint], key: Callable[[SweepPoint], Key]) -> list[tuple[Key, list[SweepPoint]]]:
    groups: dict[Key, list[SweepPoint]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return list(groups.items())
