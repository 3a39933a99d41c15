"""The plan as a picture."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bitfleet.launch.plan.plan import Estimate, find_limit
from bitfleet.launch.plan.table import WORDS, answer
from bitfleet.trainer.config import TrainConfig

COLORS = {"data": "#756bb1", "compute": "#2c7fb8", "launches": "#2f9c86", "network": "#d94801", "update": "#969696"}


def plot_plan(
    config: TrainConfig, num_images: int, estimates: Sequence[Estimate], asked: Estimate, unit: str, output: Path
) -> None:
    """Draw images/s over the nodes, and what each resource needs of a step.

    Raises:
        ValueError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 5), constrained_layout=True)
    left, right = figure.subplots(1, 2)
    words = "\n".join(textwrap.fill(sentence, 125) for sentence in answer(config, num_images, estimates, asked, unit))
    figure.suptitle(f"{config.name}\n{words}", fontsize=10, x=0.01, ha="left")
    nodes = [e.num_nodes for e in estimates]
    _draw_throughput(left, nodes, estimates)
    _draw_parts(right, nodes, estimates)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(nodes, [str(number) for number in nodes])
        axis.set_xlabel("nodes")
        axis.grid(alpha=0.25)
        axis.axvline(asked.num_nodes, color="#bbbbbb", linewidth=6, alpha=0.35, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=90)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write the picture {output}: {error}") from error


def _draw_throughput(axis: Any, nodes: list[int], estimates: Sequence[Estimate]) -> None:
    values = [e.images_per_second for e in estimates]
    low, high = min(values) / 2.2, max(values) * 2
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    per_node = values[0] / nodes[0]
    axis.plot([nodes[0], high / per_node], [values[0], high], color="#bbbbbb", linestyle="--")
    axis.annotate("dashed: every node as fast as one alone", (0.98, 0.97), xycoords="axes fraction", color="#888888",
                  fontsize=9, ha="right", va="top")  # fmt: skip
    limit = find_limit(estimates)
    if limit.reason:
        axis.axvspan(limit.num_nodes * 1.05, nodes[-1] * 1.4, color="#d94801", alpha=0.06, zorder=0)
        axis.annotate(f"more than {limit.num_nodes} do not help", (0.98, 0.03), xycoords="axes fraction", color="#d94801",
                      fontsize=9, ha="right")  # fmt: skip
    axis.plot(nodes, values, color="black", marker="o")
    for e, before, after in zip(estimates, [values[0], *values], [*values[1:], values[-1]], strict=False):
        value = e.images_per_second
        place, side = (0, -9), "center"
        if after > 1.3 * value:  # next to a steep line, which would run through what stands below the point
            place, side = (7, 0), "left"
        elif value > 1.3 * before and after < value:  # a summit
            place, side = (4, 24), "left"
        elif value > 1.3 * before:
            place, side = (4, -14), "left"
        elif after < 0.75 * value:
            place, side = (-2, -9), "right"
        axis.annotate(f"{value:,.0f}\n{e.binding}", (e.num_nodes, value), xytext=place, textcoords="offset points", ha=side,
                      va="top", fontsize=7.5, color=COLORS[e.binding])  # fmt: skip
    axis.set_xlim(nodes[0] / 1.5, nodes[-1] * 1.4)
    axis.set_title("images/s, and what binds", fontsize=10)


def _draw_parts(axis: Any, nodes: list[int], estimates: Sequence[Estimate]) -> None:
    ends = []
    for name, color in COLORS.items():
        values = [1e3 * getattr(e, name) for e in estimates]
        axis.plot(nodes, values, color=color, marker=".")
        ends.append((values[-1], WORDS[name], color))  # type: ignore[index]
    steps = [1e3 * e.step for e in estimates]
    axis.plot(nodes, steps, color="black", linewidth=2.5)
    ends.append((steps[-1], "the whole step", "black"))
    axis.set_yscale("log")
    axis.set_ylim(min(steps) / 300, max(steps) * 1.5)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Labels at the end of each line, at least a line's height apart.
    top, bottom = axis.get_ylim()[1], axis.get_ylim()[0]
    previous = 0.0
    for value, text, color in sorted(ends):
        place = max(value, bottom * 1.02, previous * (top / bottom) ** 0.055)
        previous = place
        if value > 0:
            axis.annotate(text, (nodes[-1], place), xytext=(8, 0), textcoords="offset points", color=color, fontsize=9,
                          va="center", annotation_clip=False)  # fmt: skip
    axis.set_title("ms a step", fontsize=10)
