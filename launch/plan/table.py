"""Write a plan as text: the answer in sentences, a table over node counts, kernel launches, and the
source of every rate."""

from collections.abc import Sequence

from bitfleet.launch.plan.plan import (
    LEAST_EFFICIENCY,
    LEAST_GAIN,
    Cluster,
    Estimate,
    Mode,
    Resource,
    efficiency_of,
    find_limit,
    mode_of,
)
from bitfleet.launch.plan.rates import Rates, numbers
from bitfleet.launch.text import table
from bitfleet.trainer.config import TrainConfig

WORDS: dict[Resource, str] = {
    "data": "decoding images",
    "compute": "forward and backward",
    "launches": "Python and kernel launches",
    "network": "the network",
    "update": "the optimizer's update",
}


def num_hours(config: TrainConfig, num_images: int, estimate: Estimate) -> float:
    """Return the hours of all epochs of `num_images`, without validation."""
    return config.epochs * (num_images // config.global_batch_size) * estimate.step / 3600


def answer(
    config: TrainConfig, num_images: int, estimates: Sequence[Estimate], asked: Estimate, unit: str
) -> list[str]:
    """Return two sentences: the speed of the cluster that was asked about, and how many nodes are
    worth having."""
    limit, reason = find_limit(estimates)
    more = f"Every doubling helps up to {_nodes(limit)}; the batch divides over no more."
    if reason:
        more = f"More than {_nodes(limit)} {'does' if limit == 1 else 'do'} not help: {reason}."
    return [
        f"{_nodes(asked.num_nodes)} with {asked.world_size // asked.num_nodes} {unit}s each: "
        f"{asked.images_per_second:,.0f} images/s, {1e3 * asked.step:,.1f} ms per step, "
        f"{num_hours(config, num_images, asked):,.1f} hours for {config.epochs} epochs of {num_images:,} images; "
        f"{_binds(asked)}.",
        more,
    ]


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count > 1)}"


def _binds(estimate: Estimate) -> str:
    return f"{WORDS[estimate.binding]} bind{'' if estimate.binding in ('compute', 'launches') else 's'}"


def format_plan(
    config: TrainConfig,
    num_images: int,
    rates: Rates,
    cluster: Cluster,
    estimates: Sequence[Estimate],
    shardings: dict[str, Estimate],
    modes: dict[Mode, Estimate],
) -> str:
    """Return the whole report: results of `scan`, `other_shardings` and `all_modes`."""
    on_gpu = rates.device == "gpu"
    unit = "GPU" if on_gpu else "rank"
    (asked,) = [e for e in estimates if e.num_nodes == cluster.num_nodes]
    others = ", ".join(f"{option} {e.images_per_second:,.0f}" for option, e in shardings.items())
    step = (
        "step is the longest of data, of launches, and of compute + network + update"
        if on_gpu
        else "step is data + compute + launches + network + update: the ranks of a node share its cores"
    )
    return "\n".join(
        [
            f"{config.name}: batch {config.global_batch_size} over all nodes, sharding {config.engine.sharding}, "
            f"gradients {config.engine.grad_comm_dtype}, {rates.name}, {8e-9 * cluster.link_bytes_per_second:g} Gbit/s "
            f"and {cluster.cores:g} cores per node",
            "",
            *answer(config, num_images, estimates, asked, unit),
            f"Other options instead, images/s: {others}.",
            "",
            _format_scan(config, num_images, estimates, asked, unit),
            "",
            f"data to step: ms per step. sent and off node: MB per step of a {unit} and of a node. {step}; network is "
            "what backward does not hide of gradients, then agreement, weights and running statistics.",
            f"More nodes do not help if doubling them adds less than {LEAST_GAIN:.0%} images/s, or leaves each with "
            f"less than {LEAST_EFFICIENCY:.0%} of those of the first line. Validation, checkpoints and logging are not "
            "counted.",
            "",
            *([*format_launches(modes, mode_of(config, rates)), ""] if on_gpu else []),
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


def format_launches(modes: dict[Mode, Estimate], configured: Mode) -> list[str]:
    """Return lines about the kernels per rank, eager and compiled, and what a CUDA graph of the
    step saves.

    The line of the mode that is `configured` is marked.
    """
    parts = ("forward", "backward", "rest", "update", "exchange", "step")
    rows = [["kernels per rank", *parts, "launch ms", "step ms", "graph launch ms", "graph step ms"]]
    for compiled in (False, True):
        host, graph = modes[Mode(compiled, False)], modes[Mode(compiled, True)]
        name = "> " * (compiled == configured.compiled) + ("compiled, estimated" if compiled else "eager")
        seconds = (host.launches, host.step, graph.launches, graph.step)
        rows.append([name, *(str(getattr(host.kernels, part)) for part in parts), *(f"{1e3 * s:.2f}" for s in seconds)])
    host, graph = modes[Mode(configured.compiled, False)], modes[Mode(configured.compiled, True)]
    saved = host.step - graph.step
    return [
        *table(rows, "<").splitlines(),
        f"forward, backward and rest: per micro-batch ({host.kernels.num_micro_batches} per step).",
        f"A CUDA graph launches the step in {1e3 * graph.launches:.2f} ms instead of {1e3 * host.launches:.2f}, and "
        f"saves {1e3 * saved:.2f} of {1e3 * host.step:.2f} ms per step ({saved / host.step:.0%}): {_binds(host)} "
        f"without it, {_binds(graph)} with it.",
    ]
