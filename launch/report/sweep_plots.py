"""Pictures of a sweep's end: accuracy of all seeds, tables of two axes, convergence, robustness."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bitfleet.launch.report.drawing import (
    FONT,
    GREY,
    End,
    label_ends,
    ordered_colors,
    panels,
    percent,
    png,
    title,
    word_colors,
)
from bitfleet.launch.report.statistics import WITHIN, Spread
from bitfleet.launch.report.sweep_findings import Grid, Slope, Speed, plus_minus, speeds
from bitfleet.launch.report.sweep_results import SweepPoint, SweepResults, show

MAX_ROWS = 60
BLUE, ORANGE = "#2c7fb8", "#d94801"


def rows_of(results: SweepResults) -> list[SweepPoint]:
    """The points in their order, failed ones too; the best 60 if there are more."""
    points = list(results.points)
    if len(points) <= MAX_ROWS:
        return points
    chosen = results.ranked[:MAX_ROWS]
    return [point for point in points if point in chosen]


def draw_dots(results: SweepResults) -> bytes:
    """Accuracy at the end: a dot a seed, mean and standard deviation a point."""
    points = rows_of(results)
    picture = panels(1, width=8.6, height=1.1 + 0.27 * len(points), columns=1)
    axis = picture.axes[0]
    best = results.ranked[0]
    values = [run.end["top1"] for point in points for run in point.finished]
    for row, point in enumerate(points):
        color = ORANGE if point is best else BLUE
        if point.top1 is None:
            words = point.others[0].status if point.others else "no result"
            axis.annotate(words, (0.01, row), xycoords=("axes fraction", "data"), color=GREY, fontsize=FONT - 1,
                          va="center")  # fmt: skip
            continue
        seeds = [run.end["top1"] for run in point.finished]
        if not math.isnan(point.top1.sd):
            ends = [point.top1.mean - point.top1.sd, point.top1.mean + point.top1.sd]
            axis.plot(ends, [row, row], color=color, linewidth=4, alpha=0.3)
        axis.plot([point.top1.mean] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2)
        axis.plot(seeds, [row] * len(seeds), "o", color=color, markersize=3.5, alpha=0.75, markeredgewidth=0)
        axis.annotate(plus_minus(point.top1), (1.01, row), xycoords=("axes fraction", "data"), color=color,
                      fontsize=FONT - 1, va="center", annotation_clip=False)  # fmt: skip
    room = max(0.05 * (max(values) - min(values)), 0.003)
    axis.set_xlim(max(0.0, min(values) - room), min(1.0, max(values) + room))
    axis.set_yticks(range(len(points)), [point.name for point in points])
    axis.set_ylim(len(points) - 0.4, -0.6)
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.set_xlabel("top-1 at the end: a dot a seed, a stroke the mean, a bar ± one standard deviation", fontsize=FONT)
    return png(picture.figure)


def draw_grids(grids: Sequence[Grid], key: str, name: str) -> bytes | None:
    """A table of two axes for each of `grids`: "top1" in percent, anything else on a logarithmic scale."""
    values = [mean for grid in grids for point in grid.cells.values() if (mean := _mean(point, key)) > 0]
    if not values:
        return None
    widest = max(len(grid.x_values) for grid in grids)
    highest = max(len(grid.y_values) for grid in grids)
    columns = 1 if widest > 6 else 2
    picture = panels(len(grids), width=2.2 + 0.85 * widest, height=1.5 + 0.55 * highest, columns=columns)
    norm = Normalize(min(values), max(values)) if key == "top1" else LogNorm(min(values), max(values))
    for axis, grid in zip(picture.axes, grids, strict=True):
        _draw_grid(axis, grid, key, norm)
        title(axis, f"{name}, {grid.rest}" if grid.rest else name)
    return png(picture.figure)


def _mean(point: SweepPoint, key: str) -> float:
    found = point.end(key)
    return found.mean if found else math.nan


def _draw_grid(axis: Any, grid: Grid, key: str, norm: Any) -> None:
    table = np.full((len(grid.y_values), len(grid.x_values)), np.nan)
    axis.grid(False)
    best = max((mean for point in grid.cells.values() if not math.isnan(mean := _mean(point, key))), default=math.nan)
    for row, y in enumerate(grid.y_values):
        for column, x in enumerate(grid.x_values):
            point = grid.cells.get((x, y))
            table[row, column] = value = math.nan if point is None else _mean(point, key)
            if point is None or math.isnan(value):
                text = "" if point is None else point.others[0].status if point.others else "-"
                axis.text(column, row, text, ha="center", va="center", fontsize=FONT - 2, color=GREY)
                continue
            shade = float(norm(value)) if value > 0 else 0.0
            text = plus_minus(point.end(key)).replace(" ± ", "\n± ") if key == "top1" else _power(value)
            weight = "bold" if key == "top1" and value == best else "normal"
            axis.text(column, row, text, ha="center", va="center", fontsize=FONT - 1, weight=weight,
                      color="white" if shade < 0.6 else "black")  # fmt: skip
    shown = np.where(table > 0, table, np.nan) if key != "top1" else table
    axis.imshow(shown, norm=norm, cmap="viridis", origin="lower", aspect="auto")
    axis.set_facecolor("#eeeeee")
    axis.set_xticks(range(len(grid.x_values)), [show(value) for value in grid.x_values])
    axis.set_yticks(range(len(grid.y_values)), [show(value) for value in grid.y_values])
    axis.set_xlabel(grid.x_axis, fontsize=FONT)
    axis.set_ylabel(grid.y_axis, fontsize=FONT)


def _power(value: float) -> str:
    return show(float(f"{value:.1e}"))


def draw_speeds(results: SweepResults, found: Sequence[float]) -> bytes | None:
    """Steps to each of the accuracies `found`; what no seed reaches has no dot."""
    points = [point for point in rows_of(results) if point.finished]
    table = [speeds(point, found) for point in points]
    reached = [speed for row in table for speed in row if speed.reached]
    if not reached:
        return None
    picture = panels(1, width=8.6, height=1.3 + 0.27 * len(points), columns=1)
    axis = picture.axes[0]
    for column, (level, color) in enumerate(zip(found, ordered_colors(len(found)), strict=True)):
        for row, each in enumerate(table):
            _draw_speed(axis, row + 0.2 * (column - (len(found) - 1) / 2), each[column], color)
        axis.annotate(f"● {100 * level:.0f} % top-1", (0.22 * column, 1.0), xytext=(0, 6), xycoords="axes fraction",
                      textcoords="offset points", color=color, fontsize=FONT, annotation_clip=False)  # fmt: skip
    for row, each in enumerate(table):
        late = [f"{100 * s.level:.0f} %: {len(s.reached)} of {s.num}" for s in each if len(s.reached) < s.num]
        if late:
            axis.annotate("reach " + ", ".join(late), (1.01, row), xycoords=("axes fraction", "data"), color=GREY,
                          fontsize=FONT - 1.5, va="center", annotation_clip=False)  # fmt: skip
    axis.set_yticks(range(len(points)), [point.name for point in points])
    axis.set_ylim(len(points) - 0.4, -0.6)
    axis.set_xlim(0, 1.05 * max(step for speed in reached for step in speed.reached))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_xlabel("steps until a validation reaches it: a small dot a seed, a large one the mean", fontsize=FONT)
    return png(picture.figure)


def _draw_speed(axis: Any, row: float, speed: Speed, color: str) -> None:
    if speed.steps is None:
        return
    axis.plot(speed.reached, [row] * len(speed.reached), "o", color=color, markersize=3, alpha=0.6, markeredgewidth=0)
    whole = len(speed.reached) == speed.num
    axis.plot([speed.steps.mean], [row], "o", color=color, markersize=6, fillstyle="full" if whole else "none")


def draw_slopes(slopes: Sequence[Slope]) -> bytes:
    """Accuracy along each hyperparameter; the region within one point of the best is drawn thick."""
    axes = list(dict.fromkeys(slope.axis for slope in slopes))
    picture = panels(len(axes), width=5.0, height=3.3)
    tops = [top1 for slope in slopes for point in slope.points if (top1 := point.top1)]
    for axis, name in zip(picture.axes, axes, strict=True):
        group = [slope for slope in slopes if slope.axis == name]
        ends = [_draw_slope(axis, slope, color) for slope, color in zip(group, word_colors(len(group)), strict=True)]
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=9))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(name, fontsize=FONT)
        percent(axis, min(top1.mean - _sd(top1) for top1 in tops), max(top1.mean + _sd(top1) for top1 in tops))
        title(axis, f"top-1 over {name}; thick: within {100 * WITHIN:.0f} point of the best")
        label_ends(axis, ends)
    return png(picture.figure)


def _sd(value: Spread) -> float:
    return 0.0 if math.isnan(value.sd) else value.sd


def _draw_slope(axis: Any, slope: Slope, color: str) -> End:
    known = [(point.get(slope.axis), point.top1) for point in slope.points if point.top1]
    xs, tops = [x for x, _ in known], [top1 for _, top1 in known]
    means = [top1.mean for top1 in tops]
    axis.errorbar(
        xs, means, yerr=[top1.sd for top1 in tops], color=color, linewidth=1, marker="o", markersize=4, capsize=2
    )
    region = slope.region
    inside = np.geomspace(region.low, region.high, 50)
    logs = np.log10(np.array(xs, dtype=float))
    axis.plot(
        inside, np.interp(np.log10(inside), logs, means), color=color, linewidth=6, alpha=0.35, solid_capstyle="butt"
    )
    at_least = "≥ " if region.open_low or region.open_high else ""
    return End(
        10.0 ** float(logs.max()),
        means[-1],
        f"{slope.group or ''} {at_least}{region.decades:.1f} decades".strip(),
        color,
    )
