"""Draw a sweep: curves, accuracy of all seeds at the end, tables of two axes, convergence,
robustness."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bitfleet.configs.sweeps.sweep import EACH_AXIS, EACH_POINT
from bitfleet.launch.report import drawing
from bitfleet.launch.report.drawing import FONT, GREY, MAX_LINES, End
from bitfleet.launch.report.intervals import WITHIN, Spread, plus_minus, spread
from bitfleet.launch.report.sweep_findings import Grid, Slope, Speed, speeds
from bitfleet.launch.report.sweep_results import Curve, Labels, SweepPoint, SweepResults, mean_top1, show

MAX_PANELS, MAX_ROWS = 12, 60
BLUE, ORANGE = "#2c7fb8", "#d94801"
MeanCurve = tuple[Curve, list[Spread]]


class Facet(NamedTuple):
    """A panel: its name, its points and their names there."""

    name: str
    points: Sequence[SweepPoint]
    labels: Sequence[str]


def mean_curve(point: SweepPoint, key: str) -> MeanCurve:
    """Return the mean over the seeds of the curve `key` at the steps that all of them have, and the
    spread there."""
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
    known = list(results.axes[axis])
    values = [point.get(axis) or 0.0 for point in points]
    places = [known.index(value) if value in known else len(known) for value in values]
    line = [points[number] for number in sorted(range(len(points)), key=places.__getitem__)]
    return Facet(axis, line, [results.word(point.get(axis)) for point in line])


def draw_curves(results: SweepResults, key: str, name: str) -> bytes | None:
    """Draw the curve `key` of all points: top-1 in percent, others logarithmically; None without
    one."""
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
    """Return a colour per point: in order if they differ in numbers only, else ten distinct
    ones."""
    words = {tuple(label for label in point.labels if isinstance(label[1], str)) for point in points}
    is_ordered = len(words) == 1 and len(points) > 2
    return drawing.ordered_colors(len(points)) if is_ordered else drawing.word_colors(len(points))


def _short_names(points: Sequence[SweepPoint]) -> list[str]:
    """Return the names of `points` without the parts that all of them share."""
    parts = [point.name.split(", ") for point in points]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [", ".join(part for part in words if part not in shared) or ", ".join(words) for words in parts]


def rows_of(results: SweepResults) -> list[SweepPoint]:
    """Return the points in their order, failed ones too; the best 60 if there are more."""
    chosen = results.points if len(results.points) <= MAX_ROWS else results.ranked[:MAX_ROWS]
    return [point for point in results.points if point in chosen]


def _rows(points: Sequence[SweepPoint], height: float) -> Any:
    """Return a panel with one named row per point."""
    (axis,) = drawing.panels(1, width=8.6, height=height + 0.27 * len(points))
    axis.set_yticks(range(len(points)), [point.name for point in points])
    axis.set_ylim(len(points) - 0.4, -0.6)
    return axis


def _remark(axis: Any, row: int, text: str, *, x: float = 1.01, color: str = GREY, font: float = FONT - 1) -> None:
    axis.annotate(text, (x, row), xycoords=("axes fraction", "data"), color=color, fontsize=font, va="center",
                  annotation_clip=False)  # fmt: skip


def draw_bars(results: SweepResults) -> bytes:
    """Draw the accuracy at the end: a dot per seed, mean and standard deviation per point."""
    points = rows_of(results)
    axis = _rows(points, 1.1)
    values = [value for point in points for value in point.values("top1")]
    for row, point in enumerate(points):
        color = ORANGE if point is results.ranked[0] else BLUE
        if point.top1 is None:
            _remark(axis, row, point.others[0].status if point.others else "no result", x=0.01)
            continue
        mean, sd, _ = point.top1
        if not math.isnan(sd):
            axis.plot([mean - sd, mean + sd], [row, row], color=color, linewidth=4, alpha=0.3)
        axis.plot([mean, mean], [row - 0.3, row + 0.3], color=color, linewidth=2)
        seeds = point.values("top1")
        axis.plot(seeds, [row] * len(seeds), "o", color=color, markersize=3.5, alpha=0.75, markeredgewidth=0)
        _remark(axis, row, plus_minus(point.top1), color=color)
    room = max(0.05 * (max(values) - min(values)), 0.003)
    axis.set_xlim(max(0.0, min(values) - room), min(1.0, max(values) + room))
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.set_xlabel("top-1 at the end: dot = seed, stroke = mean, bar = ± one standard deviation", fontsize=FONT)
    return drawing.png([axis])


def draw_grids(results: SweepResults, grids: Sequence[Grid], key: str, name: str) -> bytes | None:
    """Draw a table per grid: "top1" in percent, others logarithmically; None without values."""
    values = [mean for grid in grids for point in grid.cells.values() if (mean := _mean(point, key)) > 0]
    if not values:
        return None
    widest, highest = max(len(grid.x_values) for grid in grids), max(len(grid.y_values) for grid in grids)
    size = {"width": 2.2 + 0.85 * widest, "height": 1.5 + 0.55 * highest}
    axes = drawing.panels(len(grids), **size, columns=1 if widest > 6 else 2)
    norm = Normalize(min(values), max(values)) if key == "top1" else LogNorm(min(values), max(values))
    for axis, grid in zip(axes, grids, strict=True):
        table = np.array([[_mean(grid.cells.get((x, y)), key) for x in grid.x_values] for y in grid.y_values])
        axis.grid(False)
        axis.imshow(np.where(table > 0, table, np.nan), norm=norm, cmap="viridis", origin="lower", aspect="auto")
        axis.set_facecolor("#eeeeee")
        for row, y in enumerate(grid.y_values):
            for column, x in enumerate(grid.x_values):
                is_best = key == "top1" and table[row, column] == np.nanmax(table, initial=-math.inf)
                _write_cell(axis, (column, row), grid.cells.get((x, y)), key, norm, is_best=bool(is_best))
        axis.set_xticks(range(len(grid.x_values)), [results.word(value) for value in grid.x_values])
        axis.set_yticks(range(len(grid.y_values)), [results.word(value) for value in grid.y_values])
        axis.set_xlabel(grid.x_axis, fontsize=FONT)
        axis.set_ylabel(grid.y_axis, fontsize=FONT)
        drawing.title(axis, f"{name}, {grid.rest}" if grid.rest else name)
    return drawing.png(axes)


def _mean(point: SweepPoint | None, key: str) -> float:
    value = point.end(key) if point else None
    return value.mean if value else math.nan


def _write_cell(
    axis: Any, at: tuple[int, int], point: SweepPoint | None, key: str, norm: Any, *, is_best: bool
) -> None:
    value = _mean(point, key)
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": FONT - 1}
    if point is None or math.isnan(value):
        text = "" if point is None else point.others[0].status if point.others else "-"
        axis.text(*at, text, **style | {"fontsize": FONT - 2}, color=GREY)
        return
    is_dark = value <= 0 or float(norm(value)) < 0.6
    text = plus_minus(point.end(key)).replace(" ± ", "\n± ") if key == "top1" else show(float(f"{value:.1e}"))
    axis.text(*at, text, **style, weight="bold" if is_best else "normal", color="white" if is_dark else "black")


def draw_speeds(results: SweepResults, accuracies: Sequence[float]) -> bytes | None:
    """Draw the steps to each of `accuracies`; one that no seed reaches has no dot."""
    points = [point for point in rows_of(results) if point.finished]
    table = [speeds(point, accuracies) for point in points]
    reached = [step for row in table for speed in row for step in speed.reached]
    if not reached:
        return None
    axis = _rows(points, 1.3)
    for column, (level, color) in enumerate(zip(accuracies, drawing.ordered_colors(len(accuracies)), strict=True)):
        for row, of_point in enumerate(table):
            _draw_speed(axis, row + 0.2 * (column - (len(accuracies) - 1) / 2), of_point[column], color)
        axis.annotate(f"● {100 * level:.0f} % top-1", (0.22 * column, 1.0), xytext=(0, 6), xycoords="axes fraction",
                      textcoords="offset points", color=color, fontsize=FONT, annotation_clip=False)  # fmt: skip
    for row, of_point in enumerate(table):
        late = [f"{100 * s.level:.0f} %: {len(s.reached)} of {s.num}" for s in of_point if len(s.reached) < s.num]
        if late:
            _remark(axis, row, "reach " + ", ".join(late), font=FONT - 1.5)
    axis.set_xlim(0, 1.05 * max(reached))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_xlabel("steps until a validation reaches it: small dot = seed, large dot = mean", fontsize=FONT)
    return drawing.png([axis])


def _draw_speed(axis: Any, row: float, speed: Speed, color: str) -> None:
    if speed.steps is None:
        return
    axis.plot(speed.reached, [row] * len(speed.reached), "o", color=color, markersize=3, alpha=0.6, markeredgewidth=0)
    fill = "full" if len(speed.reached) == speed.num else "none"
    axis.plot([speed.steps.mean], [row], "o", color=color, markersize=6, fillstyle=fill)


def draw_slopes(slopes: Sequence[Slope]) -> bytes:
    """Draw the accuracy along each hyperparameter; the region within one point of the best is
    thick."""
    names = list(dict.fromkeys(slope.axis for slope in slopes))
    axes = drawing.panels(len(names), width=5.0, height=3.3)
    tops = [top1 for slope in slopes for point in slope.points if (top1 := point.top1)]
    sds = [0.0 if math.isnan(top1.sd) else top1.sd for top1 in tops]
    lowest = min(top1.mean - sd for top1, sd in zip(tops, sds, strict=True))
    highest = max(top1.mean + sd for top1, sd in zip(tops, sds, strict=True))
    for axis, name in zip(axes, names, strict=True):
        group = [slope for slope in slopes if slope.axis == name]
        ends = [
            _draw_slope(axis, slope, color) for slope, color in zip(group, drawing.word_colors(len(group)), strict=True)
        ]
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=9))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(name, fontsize=FONT)
        drawing.percent(axis, lowest, highest)
        drawing.title(axis, f"top-1 over {name}; thick: within {100 * WITHIN:.0f} point of the best")
        drawing.label_ends(axis, ends)
    return drawing.png(axes)


def _draw_slope(axis: Any, slope: Slope, color: str) -> End:
    xs = [float(point.get(slope.axis) or 0.0) for point in slope.points if point.top1]
    tops = [top1 for point in slope.points if (top1 := point.top1)]
    means, sds = [top1.mean for top1 in tops], [top1.sd for top1 in tops]
    axis.errorbar(xs, means, yerr=sds, color=color, linewidth=1, marker="o", markersize=4, capsize=2)
    inside = np.geomspace(slope.region.low, slope.region.high, 50)
    thick = {"color": color, "linewidth": 6, "alpha": 0.35, "solid_capstyle": "butt"}
    axis.plot(inside, np.interp(np.log10(inside), np.log10(xs), means), **thick)
    at_least = "≥ " if slope.region.open_low or slope.region.open_high else ""
    return End(max(xs), means[-1], f"{slope.group} {at_least}{slope.region.decades:.1f} decades".strip(), color)
