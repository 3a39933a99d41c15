"""Draw what the pictures of a report share: panels, colours, axes, labels at the ends of lines."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression

from bitfleet.launch.report.sweep_results import show

WORDS = ("#332288", "#CC6677", "#117733", "#DDAA33", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933", "#555555")
"""Paul Tol's "muted" colours, safe for colour-blind readers, with a darker yellow."""
MAX_LINES = len(WORDS)
FONT = 9
GREY = "#888888"
ARROW = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}


class End(NamedTuple):
    """The last point of a line, and its label."""

    x: float
    y: float
    text: str
    color: str


def panels(number: int, *, width: float = 4.6, height: float = 3.2, columns: int = 2) -> list[Any]:
    """Return `number` axes of `width` x `height` inches in rows of `columns`, in one figure."""
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in grid[number:]:
        axis.remove()
    for axis in grid[:number]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=FONT - 1)
    return grid[:number]


def title(axis: Any, text: str) -> None:
    """Write the title of the panel `axis` at its left."""
    axis.set_title(text, fontsize=FONT + 1, loc="left")


def png(axes: Sequence[Any]) -> bytes:
    """Return the figure of `axes` as a PNG file."""
    stream = io.BytesIO()
    axes[0].get_figure().savefig(stream, format="png", dpi=110, facecolor="white")
    return stream.getvalue()


def word_colors(number: int) -> list[str]:
    """Return `number` colours without an order."""
    return [WORDS[index % len(WORDS)] for index in range(number)]


def ordered_colors(number: int) -> list[str]:
    """Return `number` colours from dark to light; the lightest is still readable on white."""
    shades = np.linspace(0.0, 0.85, number) if number > 1 else [0.0]
    return [to_hex(colormaps["viridis"](float(shade))) for shade in shades]


def readable(color: str) -> str:
    """Return `color`, dark enough for text on white."""
    red, green, blue = to_rgb(color)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    factor = min(1.0, 0.42 / luminance) if luminance else 1.0
    return to_hex((red * factor, green * factor, blue * factor))


def percent(axis: Any, lowest: float, highest: float) -> None:
    """Set y to fractions written in percent, from below `lowest` to above `highest`."""
    room = max(0.06 * (highest - lowest), 0.002)
    axis.set_ylim(max(lowest - room, 0.0), min(highest + room, 1.0))
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def logarithmic(axis: Any) -> None:
    """Set y to a logarithmic scale with one tick per decade."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=7))
    low, high = axis.get_ylim()
    if high < 100 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(float(f"{value:.3g}"))))
    axis.yaxis.set_minor_locator(NullLocator())


def steps(axis: Any) -> None:
    """Set x to optimizer steps, whole numbers from 0."""
    axis.set_xlabel("step", fontsize=FONT)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def label_ends(axis: Any, ends: Sequence[End], *, font: float = FONT - 1) -> None:
    """Label each line at the right of `axis`, in its colour and without overlaps; set the limits of
    `axis` before."""
    if not ends:
        return
    height = axis.get_window_extent().height / axis.get_figure().dpi * 72  # in points, nearly: before the layout
    low, high = axis.get_ylim()
    # A line that ends outside, as at 0 on a logarithmic axis, is labelled at the border.
    ends = [end._replace(y=min(max(end.y, low), high)) for end in ends]
    places = [_fraction(axis, end.y) for end in ends]
    order = np.argsort(places, kind="stable")
    placed = spread_out([places[index] for index in order], font * 1.22 / height)
    for index, place in zip(order, placed, strict=True):
        end = ends[index]
        axis.annotate(
            end.text,
            (end.x, end.y),
            xytext=(1.04, place),
            textcoords="axes fraction",
            fontsize=font,
            color=readable(end.color),
            va="center",
            annotation_clip=False,
            arrowprops=ARROW | {"color": end.color},
        )


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending `places` to be `gap` apart (least squares), and in 0 to 1 if they fit."""
    offsets = gap * np.arange(len(places))
    moved = isotonic_regression(np.asarray(places) - offsets).x
    return [float(place) for place in np.clip(moved, 0.0, max(1.0 - offsets[-1], 0.0)) + offsets]


def _fraction(axis: Any, y: float) -> float:
    """Return the position of `y` between the bottom (0) and the top (1) of `axis`."""
    corner = axis.get_xlim()[0], axis.get_ylim()[0]  # reading the limits updates them
    return float(axis.transAxes.inverted().transform(axis.transData.transform((corner[0], y)))[1])
