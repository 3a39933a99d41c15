"""Draw a plan."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bitfleet.launch.plan.plan import Estimate, Resource, find_limit
from bitfleet.launch.plan.table import WORDS

COLORS: dict[Resource, str] = {
    "data": "#756bb1",
    "compute": "#2c7fb8",
    "launches": "#2f9c86",
    "network": "#d94801",
    "update": "#969696",
}


def plot_plan(title: str, answer: Sequence[str], estimates: Sequence[Estimate], num_nodes: int, output: Path) -> None:
    """Draw images/s over the number of nodes, and the time that each resource needs per step.

    Args:
        title: the name of the run.
        answer: sentences to write above.
        estimates: the points.
        num_nodes: the number of nodes to mark.
        output: the file.

    Raises:
        ValueError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 5), constrained_layout=True)
    figure.suptitle("\n".join([title, *(textwrap.fill(line, 125) for line in answer)]), fontsize=10, x=0.01, ha="left")
    left, right = figure.subplots(1, 2)
    nodes = [e.num_nodes for e in estimates]
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="nodes")
        axis.xaxis.minorticks_off()
        axis.set_xticks(nodes, map(str, nodes))
        axis.grid(alpha=0.25)
        axis.axvline(num_nodes, color="#bbbbbb", linewidth=6, alpha=0.35, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.6g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    _draw_throughput(left, nodes, estimates)
    _draw_resources(right, nodes, estimates)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=90)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write the picture {output}: {error}") from error


def _draw_throughput(axis: Any, nodes: list[int], estimates: Sequence[Estimate]) -> None:
    rates, (limit, reason) = [e.images_per_second for e in estimates], find_limit(estimates)
    axis.plot(
        nodes, [rates[0] * n / nodes[0] for n in nodes], color="#bbbbbb", ls="--", label="every node as fast as one"
    )
    axis.plot(nodes, rates, color="black", marker="o")
    axis.set_ylim(min(rates) / 2.2, max(rates) * 2)
    if reason:
        label = f"more than {limit} do not help"
        axis.axvspan(limit * 1.05, nodes[-1] * 1.4, color="#d94801", alpha=0.06, zorder=0, label=label)
    for e, following in zip(estimates, [*rates[1:], rates[-1]], strict=True):
        text, falls = f"{e.images_per_second:,.0f}\n{e.binding}", following < e.images_per_second
        axis.annotate(text, (e.num_nodes, e.images_per_second), (4, 3 if falls else -9), textcoords="offset points",
                      va="bottom" if falls else "top", fontsize=7.5, color=COLORS[e.binding])  # fmt: skip
    axis.legend(loc="lower right", frameon=False, fontsize=8)
    axis.set_title("images/s, and what binds", fontsize=10)


def _draw_resources(axis: Any, nodes: list[int], estimates: Sequence[Estimate]) -> None:
    for name, color in COLORS.items():
        axis.plot(nodes, [1e3 * getattr(e, name) for e in estimates], color=color, marker=".", label=WORDS[name])
    steps = [1e3 * e.step for e in estimates]
    axis.plot(nodes, steps, color="black", linewidth=2.5, label="the whole step")
    axis.set_ylim(min(steps) / 300, max(steps) * 1.5)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axis.set_title("ms per step", fontsize=10)
