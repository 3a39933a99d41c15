"""Curves of a sweep: mean and spread over the seeds of each point, named where they end."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitfleet.launch.report.drawing import (
    FONT,
    GREY,
    MAX_LINES,
    End,
    label_ends,
    logarithmic,
    ordered_colors,
    panels,
    percent,
    png,
    steps,
    title,
    word_colors,
)
from bitfleet.launch.report.statistics import Spread, spread
from bitfleet.launch.report.sweep_results import Curve, Labels, SweepPoint, SweepResults, show

MAX_PANELS = 12


class Facet(NamedTuple):
    """Points that share a panel."""

    name: str
    points: list[SweepPoint]
    labels: list[str]
    """What each line is called there."""


def mean_curve(point: SweepPoint, key: str) -> tuple[Curve, list[Spread]]:
    """The mean over the seeds of the curve `key` at the steps that all of them have, and the spread there."""
    found = [dict(zip(*run.curves[key], strict=True)) for run in point.finished if run.curves[key].steps]
    common = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    spreads = {step: spread([curve[step] for curve in found]) for step in common}
    kept = {step: value for step, value in spreads.items() if value is not None}
    return Curve(tuple(kept), tuple(value.mean for value in kept.values())), list(kept.values())


def facets(results: SweepResults) -> list[Facet]:
    """Points that share a panel of at most ten lines; only the best ones where they are too many for panels of their own."""
    points = [point for point in results.points if point.finished]
    if len(points) <= MAX_LINES:
        return [Facet("", points, _short_names(points))]
    for groups in (_around_centre(results, points), *_partitions(results, points)):
        if len(groups) > 1 and max(len(facet.points) for facet in groups) <= MAX_LINES:
            return groups
    return [Facet(point.name, [point], [""]) for point in results.ranked[:MAX_PANELS]]


def _around_centre(results: SweepResults, points: Sequence[SweepPoint]) -> list[Facet]:
    """A panel for each axis on which points differ from the centre, which is in all of them."""
    centre, found = results.centre, []
    for axis in results.axes if centre is not None else ():
        group = [point for point in points if centre is not None and point.without(axis) == _without(centre, axis)]
        if len(group) > 1:
            if results.is_numeric(axis):
                group.sort(key=lambda point: point.get(axis) or 0.0)
            found.append(Facet(axis, group, [show(point.get(axis) or 0.0) for point in group]))
    return found


def _partitions(results: SweepResults, points: Sequence[SweepPoint]) -> list[list[Facet]]:
    """Panels by which axes are set, and by the value on each axis, fewest first."""
    by_axes = _split(points, lambda point: ", ".join(axis for axis, _ in point.labels))
    by_value = [_split(points, lambda point, axis=axis: _value(point, axis)) for axis in results.axes]
    return [by_axes, *sorted(by_value, key=len)]


def colors_of(points: Sequence[SweepPoint]) -> list[str]:
    """A colour a point: in order where they differ in a number only, else ten that are told apart."""
    words = {tuple(label for label in point.labels if isinstance(label[1], str)) for point in points}
    return ordered_colors(len(points)) if len(words) == 1 and len(points) > 2 else word_colors(len(points))


def draw_curves(results: SweepResults, key: str, name: str, *, is_fraction: bool) -> bytes | None:
    """The curve `key` of all points as a PNG; None where no run has it.

    Args:
        results: the sweep.
        key: of the curve.
        name: of its axis.
        is_fraction: percent on a linear axis; else a logarithmic one.
    """
    groups = facets(results)
    curves = {point.labels: mean_curve(point, key) for facet in groups for point in facet.points}
    values = [value for curve, _ in curves.values() for value in curve.values if is_fraction or value > 0]
    if not values:
        return None
    lowest = min(values)
    if is_fraction:  # the ends are what is compared: the early rise may be cut off
        ends = [curve.values[-1] for curve, _ in curves.values() if curve.values]
        lowest = max(lowest, max(values) - max(0.3, 4 * (max(ends) - min(ends))))
    alone = len(groups) == 1
    width, height = (8.6, 4.6) if alone else (5.0, 3.1)
    columns = 1 if alone else 2 if len(groups) <= 6 else 3
    picture = panels(len(groups), width=width, height=height, columns=columns)
    for axis, facet in zip(picture.axes, groups, strict=True):
        _draw_panel(axis, facet, curves, (lowest, max(values)), is_fraction)
        title(axis, f"{name}: {facet.name}" if facet.name else name)
    return png(picture.figure)


def _draw_panel(
    axis: Any,
    facet: Facet,
    curves: Mapping[Any, tuple[Curve, list[Spread]]],
    limits: tuple[float, float],
    is_fraction: bool,
) -> None:
    if len(facet.points) == 1:  # one line a panel: the others stand behind it
        for curve, _ in curves.values():
            axis.plot(*curve, color=GREY, linewidth=0.5, alpha=0.35)
    ends = []
    for point, label, color in zip(facet.points, facet.labels, colors_of(facet.points), strict=True):
        curve, spreads = curves[point.labels]
        if not curve.steps:
            continue
        means, sds = np.array(curve.values), np.array([value.sd for value in spreads])
        low = means - sds if is_fraction else np.maximum(means - sds, limits[0])
        axis.fill_between(curve.steps, low, means + sds, color=color, alpha=0.18, linewidth=0)
        marker = "o" if len(curve.steps) == 1 else None
        axis.plot(*curve, color=color, linewidth=1.6, marker=marker, markersize=4)
        last = f"  {100 * curve.values[-1]:.1f} %" if is_fraction else ""
        ends.append(End(curve.steps[-1], curve.values[-1], label + last, color))
    steps(axis)
    if is_fraction:
        percent(axis, *limits)
    else:
        axis.set_ylim(limits[0] / 1.5, limits[1] * 1.5)
        logarithmic(axis)
    label_ends(axis, ends, font=FONT - 1 if len(facet.points) > 1 else FONT - 1.5)


def _short_names(points: Sequence[SweepPoint]) -> list[str]:
    """The names of `points` without what all of them share."""
    parts = [point.name.split(", ") for point in points]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [", ".join(part for part in each if part not in shared) or ", ".join(each) for each in parts]


def _value(point: SweepPoint, axis: str) -> str:
    value = point.get(axis)
    return f"{axis} {'as configured' if value is None else show(value)}"


def _split(points: Sequence[SweepPoint], key: Callable[..., str]) -> list[Facet]:
    groups: dict[str, list[SweepPoint]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return [Facet(name, group, _short_names(group)) for name, group in groups.items()]


def _without(labels: Labels, axis: str) -> Labels:
    return tuple(label for label in labels if label[0] != axis)
