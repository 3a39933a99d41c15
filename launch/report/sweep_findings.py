"""What a sweep says, as numbers and sentences."""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

from bitfleet.launch.report.statistics import Difference, Plateau, Spread, plateau, spread, steps_to, welch
from bitfleet.launch.report.sweep_results import Label, SweepPoint, SweepResults, show

Key = TypeVar("Key", bound=Hashable)
LEVELS = (0.80, 0.90, 0.95)
"""Convergence is measured to these parts of the best point's accuracy."""
MIN_FILLED = 0.6
"""A table of two axes is one from this part of filled cells on."""


class Slope(NamedTuple):
    """Accuracy along one hyperparameter, everything else held at the values of the best point that has such a line."""

    axis: str
    group: str
    """Words on the other axes, as the rule; "" where there are none."""
    points: tuple[SweepPoint, ...]
    """Ascending on the axis, which is positive."""
    zero: SweepPoint | None
    """The same with 0 on the axis, which no logarithm shows."""
    region: Plateau
    """Of the means over the seeds."""
    decades_of_seeds: tuple[float, ...]
    """Width for each seed alone."""


class Grid(NamedTuple):
    """Points over two axes; the rest of their labels is the same."""

    x_axis: str
    y_axis: str
    x_values: tuple[Label, ...]
    y_values: tuple[Label, ...]
    cells: dict[tuple[Label, Label], SweepPoint]
    rest: str


class Speed(NamedTuple):
    """Steps of a point's seeds to an accuracy."""

    level: float
    reached: tuple[float, ...]
    """Steps of the seeds that reach it."""
    num: int
    """Seeds in all."""

    @property
    def steps(self) -> Spread | None:
        """Over the seeds that reach it."""
        return spread(self.reached)


def plus_minus(value: Spread | None, scale: float = 100.0, digits: int = 1) -> str:
    """Mean +- standard deviation; "-" without a value."""
    if value is None:
        return "-"
    text = f"{scale * value.mean:.{digits}f}"
    return text if math.isnan(value.sd) else f"{text} ± {scale * value.sd:.{digits}f}"


def answer(results: SweepResults) -> list[str]:
    """The sweep's result in two to four sentences."""
    best, *rest = results.ranked
    top1 = best.top1
    assert top1 is not None
    seeds = f"mean ± standard deviation of {top1.num} seeds" if top1.num > 1 else "one seed"
    sentences = [f"Best: {best.name} with {plus_minus(top1)} % top-1 ({seeds})."]
    if rest:
        sentences.append(_against_next(top1, rest[0]))
        if len(rest) > 1:
            sentences.append(_how_many(top1, rest))
    runs = [run for point in results.points for run in (*point.finished, *point.others)]
    failed, pending = (sum(run.status == status for run in runs) for status in ("failed", "pending"))
    if failed or pending:
        parts = [f"{number} {word}" for number, word in ((failed, "failed"), (pending, "not run yet")) if number]
        sentences.append(f"Incomplete: of {len(runs)} runs {' and '.join(parts)}.")
    return sentences


def _against_next(top1: Spread, second: SweepPoint) -> str:
    other = second.top1
    assert other is not None
    points = 100 * (top1.mean - other.mean)
    text = f"Next: {second.name} with {plus_minus(other)} %"
    difference = welch(top1, other)
    if difference is None:
        return f"{text}, {points:.1f} points behind; two seeds of each are the least from which a spread can be told."
    interval = f"95 % interval {100 * difference.low:+.2f} to {100 * difference.high:+.2f}, Welch"
    verdict = "more" if difference.is_clear else "no more"
    return f"{text}; the difference of {points:.1f} points ({interval}) is {verdict} than the spread over the seeds explains."


def _how_many(top1: Spread, rest: Sequence[SweepPoint]) -> str:
    tests: list[Difference] = []
    for point in rest:
        other = point.top1
        assert other is not None
        if (difference := welch(top1, other)) is not None:
            tests.append(difference)
    level = sum(not difference.is_clear for difference in tests)
    if not tests:
        return f"{len(rest) + 1} points were tried."
    alone = "each compared alone; the best of many looks better than it is"
    if not level:
        return f"All {len(tests)} other points with a spread are clearly below the best ({alone})."
    return f"Of the {len(tests)} other points with a spread, {level} cannot be told from the best ({alone})."


def levels(results: SweepResults) -> list[float]:
    """The accuracies to which convergence is measured: whole percents near 80, 90, 95 % of the best point's."""
    top1 = results.ranked[0].top1
    assert top1 is not None
    return sorted({math.floor(100 * part * top1.mean) / 100 for part in LEVELS} - {0.0})


def speeds(point: SweepPoint, found: Sequence[float]) -> list[Speed]:
    """Steps to each of the levels `found`: of the first validation that reaches it."""
    curves = [run.curves["top1"] for run in point.finished if run.curves["top1"].steps]
    result = []
    for level in found:
        reached = [steps for curve in curves if (steps := steps_to(*curve, level)) is not None]
        result.append(Speed(level, tuple(reached), len(curves)))
    return result


def fastest(results: SweepResults) -> str:
    """Which point comes first to the highest level, in a sentence; "" where no run has a curve."""
    level = levels(results)[-1:]
    found = [(speeds(point, level)[0], point) for point in results.ranked] if level else []
    whole = [(speed, point) for speed, point in found if speed.num and len(speed.reached) == speed.num]
    if not whole:
        return ""
    speed, point = min(whole, key=lambda pair: sum(pair[0].reached) / len(pair[0].reached))
    never = sum(speed.num > len(speed.reached) for speed, _ in found)
    text = f"First to {100 * level[0]:.0f} % top-1: {point.name}, after {plus_minus(speed.steps, 1.0, 0)} steps"
    return f"{text}; {never} of {len(found)} points have seeds that never reach it." if never else f"{text}."


def slopes(results: SweepResults) -> list[Slope]:
    """Accuracy along every numeric axis with at least three positive values, for each combination of words."""
    found = []
    for axis in filter(results.is_numeric, results.axes):
        having = [point for point in results.points if point.get(axis) is not None]
        for words, group in _by(having, lambda point: _words(point, results)):
            line, positive = _best_line(group, axis)
            if len(positive) >= 3 and (region := _region(positive, axis, None)) is not None:
                zero = next((point for point in line if _at(point, axis) == 0), None)
                seeds = sorted({run.seed for point in positive for run in point.finished})
                widths = [each.decades for seed in seeds if (each := _region(positive, axis, seed)) is not None]
                found.append(Slope(axis, words, positive, zero, region, tuple(widths)))
    return found


def _best_line(group: Sequence[SweepPoint], axis: str) -> tuple[list[SweepPoint], tuple[SweepPoint, ...]]:
    """The points that differ from the best one on `axis` alone, and those above 0, ascending.

    Where these are fewer than three, the best point counts through which three go: in a sweep around a centre the best
    point lies on one axis, and on the other ones the line is that through the centre.
    """
    ranked = sorted((point for point in group if point.top1), key=_mean, reverse=True)
    for best in ranked:
        line = [point for point in group if point.without(axis) == best.without(axis)]
        positive = sorted((point for point in line if _at(point, axis) > 0), key=lambda point: _at(point, axis))
        if len(positive) >= 3:
            return line, tuple(positive)
    return [], ()


def _region(points: Sequence[SweepPoint], axis: str, seed: str | None) -> Plateau | None:
    values = []
    for point in points:
        top1 = spread([run.end["top1"] for run in point.finished if seed in (None, run.seed)])
        values.append(top1.mean if top1 else None)
    return plateau([_at(point, axis) for point in points], values)


def grids(results: SweepResults) -> list[Grid]:
    """Every pair of axes that the points fill as a table of at least 2 x 2 cells."""
    found = []
    for x_axis, y_axis in itertools.combinations(results.axes, 2):
        both = [point for point in results.points if None not in (point.get(x_axis), point.get(y_axis))]
        for rest, group in _by(both, lambda point: point.without(x_axis, y_axis)):  # noqa: B023 (used at once)
            cells: dict[tuple[Label, Label], SweepPoint] = {}
            for point in group:
                x, y = point.get(x_axis), point.get(y_axis)
                assert x is not None
                assert y is not None
                cells[x, y] = point
            columns, rows = (tuple(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
            if min(len(columns), len(rows)) >= 2 and len(cells) >= MIN_FILLED * len(columns) * len(rows):
                columns, rows = _ordered(columns), _ordered(rows)
                varied = [label for label in rest if len({point.get(label[0]) for point in results.points}) > 1]
                name = ", ".join(f"{axis} {show(value)}" for axis, value in varied)
                found.append(Grid(x_axis, y_axis, columns, rows, cells, name))
    return found


def _ordered(values: tuple[Label, ...]) -> tuple[Label, ...]:
    numbers = [value for value in values if isinstance(value, float)]
    return tuple(sorted(numbers)) if len(numbers) == len(values) else values


def _words(point: SweepPoint, results: SweepResults) -> str:
    return ", ".join(str(value) for axis, value in point.labels if not results.is_numeric(axis))


def _mean(point: SweepPoint) -> float:
    return point.top1.mean if point.top1 else -math.inf


def _at(point: SweepPoint, axis: str) -> float:
    value = point.get(axis)
    assert isinstance(value, float)
    return value


def _by(points: Sequence[SweepPoint], key: Callable[[SweepPoint], Key]) -> list[tuple[Key, list[SweepPoint]]]:
    groups: dict[Key, list[SweepPoint]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return list(groups.items())
