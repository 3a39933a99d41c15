"""The plan as text: a table over node counts, the answer in words, and where every rate comes from."""

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
from bitfleet.trainer.config import TrainConfig

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
        f"{num_images:,} images; {_binds(asked)}.",
        more,
    ]


def format_launches(modes: dict[Mode, Estimate], configured: Mode) -> list[str]:
    """Kernels of a rank eager and compiled, and what a CUDA graph of the step saves.

    Args:
        modes: what `all_modes` returned.
        configured: the mode of the configuration; its line is marked.
    """
    kernels = modes[configured].kernels
    lines = [
        f"{'kernels of a rank':<19}{f'micro-batch ({kernels.num_micro_batches} a step)':^33}{'step':^27}"
        f"{'launched by the host':^22}{'as a CUDA graph':^20}",
        f"{'':<19}{'forward':>11}{'backward':>11}{'rest':>11}{'update':>9}{'exchange':>9}{'all':>9}"
        f"{'ms':>10}{'step ms':>12}{'ms':>8}{'step ms':>12}",
    ]
    for compiled in (False, True):
        host, graph = modes[Mode(compiled, False)], modes[Mode(compiled, True)]
        mark = "> " if compiled == configured.compiled else ""
        kernels = host.kernels
        lines.append(
            f"{mark + ('compiled, estimated' if compiled else 'eager'):<19}{kernels.forward:11}{kernels.backward:11}"
            f"{kernels.rest:11}{kernels.update:9}{kernels.exchange:9}{kernels.step:9}{1e3 * host.launches:10.2f}"
            f"{1e3 * host.step:12.2f}{1e3 * graph.launches:8.2f}{1e3 * graph.step:12.2f}"
        )
    host, graph = modes[Mode(configured.compiled, False)], modes[Mode(configured.compiled, True)]
    saved = host.step - graph.step
    return [
        *lines,
        f"A CUDA graph launches the step in {1e3 * graph.launches:.2f} ms instead of {1e3 * host.launches:.2f}, and saves "
        f"{1e3 * saved:.2f} of {1e3 * host.step:.2f} ms a step ({saved / host.step:.0%}): {_binds(host)} without it, "
        f"{_binds(graph)} with it.",
    ]


def _binds(estimate: Estimate) -> str:
    return f"{WORDS[estimate.binding]} bind{'' if estimate.binding in PLURAL else 's'}"


def format_plan(
    config: TrainConfig,
    num_images: int,
    rates: Rates,
    cluster: Cluster,
    estimates: Sequence[Estimate],
    shardings: dict[str, Estimate],
    modes: dict[Mode, Estimate],
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
        "step = the longest of data, of launches, and of compute + network + update"
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
            *([*format_launches(modes, mode_of(config, rates)), ""] if rates.device == "gpu" else []),
            "rates",
            *(f"  {name:<24}{value:12.4g}  {rates.sources[name]}" for name, value in numbers(rates).items()),
        ]
    )
