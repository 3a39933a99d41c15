"""The plan as text: a table over node counts, the answer in words, and where every rate comes from."""

from collections.abc import Sequence

from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.plan import (
    LEAST_EFFICIENCY,
    LEAST_GAIN,
    Cluster,
    Estimate,
    Resource,
    efficiency_of,
    find_limit,
)
from bitfleet.trainer.plan_rates import Rates, numbers

WORDS: dict[Resource, str] = {
    "data": "decoding images",
    "compute": "forward and backward",
    "launches": "Python and kernel launches",
    "network": "the network",
    "update": "the optimizer's update",
}
PLURAL: tuple[Resource, ...] = ("compute", "launches")


def num_hours(config: TrainConfig, num_images: int, estimate: Estimate) -> float:
    """Hours of the configuration's epochs, validation left out."""
    return config.epochs * (num_images // config.global_batch_size) * estimate.step / 3600


def answer(
    config: TrainConfig, num_images: int, estimates: Sequence[Estimate], asked: Estimate, unit: str
) -> list[str]:
    """Two sentences: what the asked cluster does, and how many nodes are worth having."""
    nodes = f"{asked.num_nodes} node{'s' * (asked.num_nodes > 1)}"
    limit = find_limit(estimates)
    counted = f"{limit.num_nodes} node{'s' * (limit.num_nodes > 1)}"
    if limit.reason:
        more = f"More than {counted} {'does' if limit.num_nodes == 1 else 'do'} not help: {limit.reason}."
    else:
        more = f"Every doubling helps up to {counted}, which is as far as this batch divides."
    return [
        f"{nodes} with {asked.world_size // asked.num_nodes} {unit}s each: {asked.images_per_second:,.0f} images/s, "
        f"{1e3 * asked.step:,.1f} ms a step, {num_hours(config, num_images, asked):,.1f} hours for {config.epochs} epochs of "
        f"{num_images:,} images; {WORDS[asked.binding]} bind{'' if asked.binding in PLURAL else 's'}.",
        more,
    ]


def format_plan(
    config: TrainConfig,
    num_images: int,
    rates: Rates,
    cluster: Cluster,
    estimates: Sequence[Estimate],
    shardings: dict[str, Estimate],
) -> str:
    """The whole report."""
    unit = "GPU" if rates.device == "gpu" else "rank"
    (asked,) = [e for e in estimates if e.num_nodes == cluster.num_nodes]
    others = ", ".join(f"{name} {e.images_per_second:,.0f}" for name, e in shardings.items())
    link = cluster.link_bytes_per_second * 8e-9
    lines = [
        f"{config.name}: batch {config.global_batch_size} over all nodes, sharding {config.engine.sharding}, gradients "
        f"{config.engine.grad_comm_dtype}, {rates.name}, {link:g} Gbit/s and {cluster.cores:g} cores a node",
        "",
        *answer(config, num_images, estimates, asked, unit),
        f"Other options instead, images/s: {others}.",
        "",
        f"{'':7}{'':>9}{'images':>8}  {'ms a step':<62}{'MB a step':>18}",
        f"{'nodes':>7}{unit + 's':>9}{'a ' + unit:>8}{'data':>9}{'compute':>9}{'launches':>10}{'gradients':>11}"
        f"{'network':>9}{'update':>8}{'step':>9}{'a ' + unit:>9}{'off a node':>12}{'images/s':>11}{'per node':>10}"
        f"{'hours':>9}  binds",
    ]
    for e in estimates:
        mark = "> " if e is asked else ""
        lines.append(
            f"{mark + str(e.num_nodes):>7}{e.world_size:>9}{e.images_per_rank:>8}{1e3 * e.data:9.2f}{1e3 * e.compute:9.2f}"
            f"{1e3 * e.launches:10.2f}{1e3 * e.gradients:11.2f}{1e3 * e.network:9.2f}{1e3 * e.update:8.2f}{1e3 * e.step:9.2f}"
            f"{1e-6 * e.sent_bytes:9.1f}{1e-6 * e.between_bytes:12.1f}{e.images_per_second:11,.0f}"
            f"{efficiency_of(e, estimates[0]):10.0%}{num_hours(config, num_images, e):9.1f}  {e.binding}"
        )
    together = (
        "step = the longer of data and (the longer of compute and launches) + network + update"
        if rates.device == "gpu"
        else "step = data + compute + launches + network + update: the ranks of a node share its cores"
    )
    return "\n".join(
        [
            *lines,
            "",
            together
            + "; network = what backward does not hide of gradients, then agreement, weights and running statistics.",
            f"More nodes do not help when doubling them adds less than {LEAST_GAIN:.0%} images/s, or leaves a node with less "
            f"than {LEAST_EFFICIENCY:.0%} of what a node of the first line does. Validation, checkpoints, logging are left out.",
            "",
            "rates",
            *(f"  {name:<24}{value:12.4g}  {rates.sources[name]}" for name, value in numbers(rates).items()),
        ]
    )
