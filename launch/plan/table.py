"""Write a plan: the answer in sentences, a table over node counts, the source of every rate, and a
picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitfleet.launch.plan.plan import (
    LEAST_EFFICIENCY,
    LEAST_GAIN,
    Cluster,
    Estimate,
    Resource,
    efficiency_of,
    find_limit,
)
from bitfleet.launch.plan.rates import Rates, numbers
from bitfleet.launch.text import table
from bitfleet.trainer.config import TrainConfig

RESOURCES: dict[Resource, tuple[str, str]] = {
    "data": ("decoding images binds", "#756bb1"),
    "compute": ("forward and backward bind", "#2c7fb8"),
    "launches": ("Python and kernel launches bind", "#2f9c86"),
    "network": ("the network binds", "#d94801"),
    "update": ("the optimizer's update binds", "#969696"),
}
"""Resource -> what an answer says of it, its color."""


def num_hours(config: TrainConfig, num_images: int, estimate: Estimate) -> float:
    """Return the hours of all epochs of `num_images`, without validation."""
    return config.epochs * (num_images // config.global_batch_size) * estimate.step / 3600


def answer(
    config: TrainConfig, num_images: int, estimates: Sequence[Estimate], cluster: Cluster, unit: str
) -> list[str]:
    """Return two sentences: the speed of the cluster that was asked about, and, if a network is
    known, how many nodes are worth having."""
    (asked,) = [e for e in estimates if e.num_nodes == cluster.num_nodes]
    limit, reason = find_limit(estimates)
    more = [f"Every doubling helps up to {_nodes(limit)}; the batch divides over no more."]
    if reason:
        more = [f"More than {_nodes(limit)} {'does' if limit == 1 else 'do'} not help: {reason}."]
    return [
        f"{_nodes(asked.num_nodes)} with {asked.world_size // asked.num_nodes} {unit}s each: "
        f"{asked.images_per_second:,.0f} images/s, {1e3 * asked.step:,.1f} ms per step, "
        f"{num_hours(config, num_images, asked):,.1f} hours for {config.epochs} epochs of {num_images:,} images; "
        f"{RESOURCES[asked.binding][0]}.",
        *(more if math.isfinite(cluster.link_bytes_per_second) else []),
    ]


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count > 1)}"


def format_plan(
    config: TrainConfig,
    num_images: int,
    rates: Rates,
    cluster: Cluster,
    estimates: Sequence[Estimate],
    others: Mapping[str, Estimate],
) -> str:
    """Return the whole report: results of `scan` and `alternatives`."""
    on_gpu = rates.device == "gpu"
    unit = "GPU" if on_gpu else "rank"
    (asked,) = [e for e in estimates if e.num_nodes == cluster.num_nodes]
    link = 8e-9 * cluster.link_bytes_per_second
    network = f"{link:g} Gbit/s and " if math.isfinite(link) else ""
    speeds = [f"{option} {other.images_per_second:,.0f}" for option, other in others.items()]
    step = (
        "step is the longest of data, of launches, and of compute + network + update"
        if on_gpu
        else "step is data + compute + launches + network + update: the ranks of a node share its cores"
    )
    return "\n".join(
        [
            f"{config.name}: batch {config.global_batch_size} over all nodes, sharding {config.engine.sharding}, "
            f"gradients {config.engine.grad_comm_dtype}, {rates.name}, {network}{cluster.cores:g} cores per node",
            "",
            *answer(config, num_images, estimates, cluster, unit),
            *([f"Other options, images/s: {', '.join(speeds)}."] if speeds else []),
            "",
            _format_scan(config, num_images, estimates, asked, unit),
            "",
            f"data to step: ms per step. sent and off node: MB per step of a {unit} and of a node. {step}; network is "
            "what backward does not hide of gradients, then agreement, weights and running statistics.",
            f"More nodes do not help if doubling them adds less than {LEAST_GAIN:.0%} images/s, or leaves each with "
            f"less than {LEAST_EFFICIENCY:.0%} of those of the first line. Validation, checkpoints and logging are not "
            "counted.",
            "",
            "rates",
            table([(name, f"{value:.4g}", rates.sources[name]) for name, value in numbers(rates).items()], "<><"),
        ]
    )


def _format_scan(
    config: TrainConfig, num_images: int, estimates: Sequence[Estimate], asked: Estimate, unit: str
) -> str:
    times = ("data", "compute", "launches", "gradients", "network", "update", "step")
    rows = [
        ["nodes", f"{unit}s", f"images/{unit}", *times, "sent", "off node", "images/s", "per node", "hours", "binds"]
    ]
    for e in estimates:
        rows.append(
            [
                "> " * (e is asked) + str(e.num_nodes),
                str(e.world_size),
                str(e.images_per_rank),
                *(f"{1e3 * getattr(e, name):.2f}" for name in times),
                f"{1e-6 * e.sent_bytes:.1f}",
                f"{1e-6 * e.between_bytes:.1f}",
                f"{e.images_per_second:,.0f}",
                f"{efficiency_of(e, estimates[0]):.0%}",
                f"{num_hours(config, num_images, e):.1f}",
                e.binding,
            ]
        )
    return table(rows, ">" * 15 + "<")


def draw_plan(title: str, estimates: Sequence[Estimate], output: Path) -> None:
    """Draw images/s and the ms per step of each resource over the number of nodes, as a PNG.

    Raises:
        ValueError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure = Figure(figsize=(11, 4.5), constrained_layout=True)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    nodes, rates = [e.num_nodes for e in estimates], [e.images_per_second for e in estimates]
    speed, parts = figure.subplots(1, 2)
    speed.plot(nodes, [rates[0] * n / nodes[0] for n in nodes], color="#bbbbbb", ls="--", label="as fast as the first")
    speed.plot(nodes, rates, color="black", label="predicted")
    speed.set_ylim(min(rates) / 2, max(rates) * 2)
    for name, (_, color) in RESOURCES.items():
        bound = [e for e in estimates if e.binding == name]
        x, y = [e.num_nodes for e in bound], [e.images_per_second for e in bound]
        speed.plot(x, y, "o", color=color, label=f"bound by {name}" if bound else None)
        parts.plot(nodes, [1e3 * getattr(e, name) for e in estimates], color=color, marker=".", label=name)
    steps = [1e3 * e.step for e in estimates]
    parts.plot(nodes, steps, color="black", linewidth=2.5, label="step")
    parts.set_ylim(min(steps) / 300, max(steps) * 1.5)
    for axis, title in ((speed, "images/s"), (parts, "ms per step")):
        axis.set(xscale="log", yscale="log", xlabel="nodes", title=title)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(nodes, map(str, nodes))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.6g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    speed.legend(frameon=False, fontsize=8, loc="lower right")
    parts.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=90)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write the picture {output}: {error}") from error
