"""Draw the curves of a sweep: mean and spread over the seeds of each point, labelled at their ends."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bitfleet.configs.sweeps.sweep import EACH_AXIS, EACH_POINT
from bitfleet.launch.report import drawing
from bitfleet.launch.report.drawing import FONT, GREY, MAX_LINES, End
from bitfleet.launch.report.intervals import Spread, spread
from bitfleet.launch.report.sweep_results import Curve, Labels, SweepPoint, SweepResults, mean_top1

MAX_PANELS = 12
MeanCurve = tuple[Curve, list[Spread]]


class Facet(NamedTuple):
    """A panel: its name, its points and their names there."""

    name: str
    points: Sequence[SweepPoint]
    labels: Sequence[str]


def mean_curve(point: SweepPoint, key: str) -> MeanCurve:
    """Return the mean over the seeds of the curve `key` at the steps that all of them have, and the spread there."""
    curves = [dict(zip(*run.curves[key], strict=True)) for run in point.finished if run.curves[key].steps]
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    spreads = {step: value for step in common if (value := spread([curve[step] for curve in curves]))}
    return Curve(tuple(spreads), tuple(value.mean for value in spreads.values())), list(spreads.values())


def facets(results: SweepResults) -> list[Facet]:
    """Return the panels that the figure declares, each of at most ten lines: the best points."""
    kind, points = results.figure.facets, [point for point in results.points if point.finished]
    if kind == EACH_POINT:
        return [Facet(point.name, [point], [""]) for point in results.ranked[:MAX_PANELS]]
    if kind == EACH_AXIS:
        centre = tuple(results.figure.centre.items())
        return [_along(results, axis, [p for p in points if set(centre) - set(p.labels) <= {(axis, value)}])
                for axis, value in centre]  # fmt: skip
    groups: dict[str, list[SweepPoint]] = {}
    for point in points:
        groups.setdefault(f"{kind} {results.word(point.get(kind))}" if kind else "", []).append(point)
    kept = {name: sorted(group, key=mean_top1, reverse=True)[:MAX_LINES] for name, group in groups.items()}
    best = {name: [point for point in groups[name] if point in kept[name]] for name in groups}
    return [Facet(name, group, _short_names(group)) for name, group in best.items()]


def _along(results: SweepResults, axis: str, points: Sequence[SweepPoint]) -> Facet:
    values = list(results.axes[axis])
    line = sorted(points, key=lambda point: values.index(point.get(axis) or 0.0))
    return Facet(axis, line, [results.word(point.get(axis)) for point in line])


def draw_curves(results: SweepResults, key: str, name: str) -> bytes | None:
    """Draw the curve `key` of all points as a PNG: top-1 in percent, anything else on a logarithmic axis; None without one."""
    panels, is_fraction = facets(results), key == "top1"
    curves = {point.labels: mean_curve(point, key) for facet in panels for point in facet.points}
    values = [value for curve, _ in curves.values() for value in curve.values if is_fraction or value > 0]
    if not values:
        return None
    lowest = min(values)
    if is_fraction:  # the ends are compared: the early rise may be cut off
        ends = [curve.values[-1] for curve, _ in curves.values() if curve.values]
        lowest = max(lowest, max(values) - max(0.3, 4 * (max(ends) - min(ends))))
    width, height, columns = (5.0, 3.1, 2 if len(panels) <= 6 else 3) if len(panels) > 1 else (8.6, 4.6, 1)
    axes = drawing.panels(len(panels), width=width, height=height, columns=columns)
    for axis, facet in zip(axes, panels, strict=True):
        _draw_panel(axis, facet, curves, (lowest, max(values)), is_fraction)
        drawing.title(axis, f"{name}: {facet.name}" if facet.name else name)
    return drawing.png(axes)


def _draw_panel(
    axis: Any, facet: Facet, curves: dict[Labels, MeanCurve], limits: tuple[float, float], is_fraction: bool
) -> None:
    if len(facet.points) == 1:  # the lines of the other panels, in grey
        for curve, _ in curves.values():
            axis.plot(*curve, color=GREY, linewidth=0.5, alpha=0.35)
    ends = []
    for point, label, color in zip(facet.points, facet.labels, _colors(facet.points), strict=True):
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
    drawing.steps(axis)
    if is_fraction:
        drawing.percent(axis, *limits)
    else:
        axis.set_ylim(limits[0] / 1.5, limits[1] * 1.5)
        drawing.logarithmic(axis)
    drawing.label_ends(axis, ends, font=FONT - 1 if len(facet.points) > 1 else FONT - 1.5)


def _colors(points: Sequence[SweepPoint]) -> list[str]:
    """Return a colour per point: in order if they differ in numbers only, else ten distinct ones."""
    words = {tuple(label for label in point.labels if isinstance(label[1], str)) for point in points}
    is_ordered = len(words) == 1 and len(points) > 2
    return drawing.ordered_colors(len(points)) if is_ordered else drawing.word_colors(len(points))


def _short_names(points: Sequence[SweepPoint]) -> list[str]:
    """Return the names of `points` without the parts that all of them share."""
    parts = [point.name.split(", ") for point in points]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [", ".join(part for part in words if part not in shared) or ", ".join(words) for words in parts]
