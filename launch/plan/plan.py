"""How long a step takes on a cluster, and what binds it: arithmetic on a run's configuration and a machine's rates.

The overlap is the code's. Images are decoded while the step before runs, and a bucket of gradients travels while backward goes
on; agreement, update, weights and running statistics come after, one after the other. A GPU does all this while its host, which
waits for nothing, launches the kernels to come. On a CPU decoding, launches and copies inside a node are work for the same cores,
so only what crosses a link between nodes overlaps.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from bitfleet.launch.plan.launches import Launches, count_launches
from bitfleet.launch.plan.rates import FLOP_PER_MAC, Rates
from bitfleet.launch.plan.traffic import Message, Network, traffic
from bitfleet.trainer.config import TrainConfig, resolve_replicas
from bitfleet.trainer.engine.config import EngineConfig

Resource = Literal["data", "compute", "launches", "network", "update"]
BACKWARD_SHARE = 2 / 3
"""Of forward and backward: gradients of inputs and of weights, against one pass."""
LEAST_GAIN, LEAST_EFFICIENCY = 0.05, 0.5
"""More nodes do not help when doubling them adds less images/s than the first, or leaves less of each than the second."""
SCAN_LIMIT = 1024
"""Nodes that are looked at, at most."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal nodes on a network without a bottleneck of its own."""

    num_nodes: int
    ranks_per_node: int
    """GPUs of a node; on a CPU the ranks that share its cores."""
    link_bytes_per_second: float
    """What a node's connection carries, in each direction."""
    cores: float
    """CPU cores of a node."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.ranks_per_node


class Mode(NamedTuple):
    """How a rank runs its kernels."""

    compiled: bool
    """The network through torch.compile."""
    cuda_graph: bool
    """The step is launched as one CUDA graph."""


def mode_of(config: TrainConfig, rates: Rates) -> Mode:
    """How `config` runs its kernels on a device of `rates`."""
    compiled = config.model.compile == "on" or (config.model.compile == "auto" and rates.device == "gpu")
    return Mode(compiled=compiled, cuda_graph=config.engine.cuda_graph)


class Estimate(NamedTuple):
    """A step on a cluster; all times in seconds."""

    num_nodes: int
    world_size: int
    images_per_rank: int
    data: float
    """Decoding; hidden behind the rest where a GPU computes."""
    compute: float
    """Forward and backward, and images on their way from the cores to the GPU."""
    launches: float
    """Python and kernel launches; on a GPU hidden behind all that the device does."""
    gradients: float
    """Gradients on their way, all of it."""
    exposed: float
    """The part of it that backward does not hide."""
    after: float
    """Agreement, weights and running statistics on their way."""
    update: float
    """Buckets and rule."""
    step: float
    images_per_second: float
    sent_bytes: float
    """By a rank."""
    between_bytes: float
    """By a node, to others."""
    binding: Resource
    """What the most of the step is spent on."""
    kernels: Launches
    """What a rank launches."""

    @property
    def network(self) -> float:
        """What the network adds to the step."""
        return self.exposed + self.after


def launch_seconds(kernels: Launches, rates: Rates, *, cuda_graph: bool) -> float:
    """The time in which a step's kernels can be launched, by a host or as one CUDA graph.

    On a CPU the update is left out: its rate contains what it costs to start.
    """
    if cuda_graph:
        return rates.graph_seconds + kernels.step * rates.node_seconds
    num_kernels = kernels.step if rates.device == "gpu" else kernels.num_micro_batches * kernels.micro_batch
    return num_kernels * rates.launch_seconds


def estimate(
    config: TrainConfig, network: Network, rates: Rates, cluster: Cluster, mode: Mode | None = None
) -> Estimate:
    """Predict a step.

    Args:
        config: the run.
        network: its network.
        rates: of the devices.
        cluster: where they are.
        mode: how kernels are run; None: as the configuration says.

    Raises:
        ValueError: batch, replicas and ranks do not divide, or the sharding's traffic is not known.
    """
    world_size = cluster.world_size
    num_micro_batches = resolve_replicas(config, world_size) // world_size
    images_per_rank = config.global_batch_size // world_size
    on_gpu = rates.device == "gpu"
    share = 1.0 if on_gpu else cluster.ranks_per_node / cluster.cores  # ranks for each device
    data, copy = _data_seconds(config, rates, cluster, images_per_rank)
    compute = share * images_per_rank * network.macs * FLOP_PER_MAC / rates.flops_per_second + copy
    mode = mode or mode_of(config, rates)
    kernels = count_launches(network.passes, network.groups, config, world_size, compiled=mode.compiled)
    launches = share * launch_seconds(kernels, rates, cuda_graph=mode.cuda_graph)
    passes = compute if on_gpu else compute + launches

    messages = traffic(network, config, world_size)
    backward = BACKWARD_SHARE * passes / num_micro_batches
    seconds = [message_seconds(message, rates, cluster) for message in messages.gradients]
    ends_at = 0.0
    for message, duration in zip(messages.gradients, seconds, strict=True):
        hidden = on_gpu or cluster.num_nodes > 1
        ends_at = max(ends_at, message.ready * backward if hidden else backward) + duration
    exposed = max(0.0, ends_at - backward)
    after = sum(message_seconds(message, rates, cluster) for message in messages.after)
    owned = network.num_parameters / (1 if config.engine.sharding == "none" else world_size)
    rule_ns = rates.update_ns if config.engine.sharding == "bits" else rates.plain_update_ns
    update = share * 1e-9 * (network.num_parameters * rates.whole_ns + owned * rule_ns)

    rest = passes + exposed + after + update
    step = max(data, launches, rest) if on_gpu else data + rest
    parts: dict[Resource, float] = {"network": exposed + after, "update": update, "compute": compute}
    others: dict[Resource, float] = {"data": data, "launches": launches}
    if on_gpu:
        parts = others if max(data, launches) > rest else parts
    else:
        parts |= others
    everything = (*messages.gradients, *messages.after)
    return Estimate(
        num_nodes=cluster.num_nodes,
        world_size=world_size,
        images_per_rank=images_per_rank,
        data=data,
        compute=compute,
        launches=launches,
        gradients=sum(seconds),
        exposed=exposed,
        after=after,
        update=update,
        step=step,
        images_per_second=config.global_batch_size / step,
        sent_bytes=messages.sent_bytes(world_size),
        between_bytes=sum(m.between_bytes(cluster.num_nodes, cluster.ranks_per_node) for m in everything),
        binding=max(parts, key=lambda name: parts[name]),
        kernels=kernels,
    )


def _data_seconds(config: TrainConfig, rates: Rates, cluster: Cluster, images_per_rank: int) -> tuple[float, float]:
    """Seconds of decoding, and of images on their way from the cores to the GPU."""
    if rates.device == "cpu":
        return cluster.ranks_per_node / cluster.cores * images_per_rank * rates.decode_seconds, 0.0
    if config.data.loader == "memory":
        return 0.0, 0.0
    if config.data.device == "cpu" or config.data.loader == "torch":
        copied_bytes = images_per_rank * 3 * config.data.image_size**2
        data = cluster.ranks_per_node * images_per_rank * rates.core_decode_seconds / cluster.cores
        return data, copied_bytes / rates.copy_bytes_per_second
    return images_per_rank * rates.decode_seconds, 0.0


def message_seconds(message: Message, rates: Rates, cluster: Cluster) -> float:
    """One collective alone: its rounds, and the slower of the link between nodes and the ways inside of one."""
    between = message.between_bytes(cluster.num_nodes, cluster.ranks_per_node)
    within = cluster.ranks_per_node * message.sent_bytes(cluster.world_size) - between
    devices = cluster.ranks_per_node if rates.device == "gpu" else cluster.cores
    return rates.latency_seconds * math.log2(cluster.world_size) + max(
        between / (cluster.link_bytes_per_second * rates.link_efficiency),
        within / (devices * rates.local_bytes_per_second),
    )


def scan(config: TrainConfig, network: Network, rates: Rates, cluster: Cluster) -> list[Estimate]:
    """Estimates for 1, 2, 4, ... nodes, as far as the batch divides, and for those of `cluster`.

    Raises:
        ValueError: see `estimate`, about `cluster` itself.
    """
    asked = estimate(config, network, rates, cluster)
    found = {cluster.num_nodes: asked}
    num_nodes = 1
    while num_nodes <= SCAN_LIMIT and num_nodes * cluster.ranks_per_node <= config.global_batch_size:
        other = dataclasses.replace(cluster, num_nodes=num_nodes)
        with contextlib.suppress(ValueError):  # ranks that the batch does not divide over; the asked number was fine
            found.setdefault(num_nodes, estimate(config, network, rates, other))
        num_nodes *= 2
    return [found[number] for number in sorted(found)]


def all_modes(config: TrainConfig, network: Network, rates: Rates, cluster: Cluster) -> dict[Mode, Estimate]:
    """The step of `cluster` eager and compiled, each launched by its host and as a CUDA graph."""
    modes = [Mode(compiled, cuda_graph) for compiled in (False, True) for cuda_graph in (False, True)]
    return {mode: estimate(config, network, rates, cluster, mode) for mode in modes}


def other_shardings(config: TrainConfig, network: Network, rates: Rates, cluster: Cluster) -> dict[str, Estimate]:
    """Options that could be passed instead, and what they would make of it."""
    engine = config.engine
    options: dict[str, EngineConfig] = {
        "--engine.grad_comm_dtype bf16": EngineConfig(grad_comm_dtype="bf16"),
        "--engine.sharding none": EngineConfig(sharding="none"),
        "--engine.sharding zero1": EngineConfig(sharding="zero1"),
    }
    return {
        name: estimate(dataclasses.replace(config, engine=option), network, rates, cluster)
        for name, option in options.items()
        if (option.sharding, option.grad_comm_dtype) != (engine.sharding, engine.grad_comm_dtype)
    }


class Limit(NamedTuple):
    """Where more nodes stop to help."""

    num_nodes: int
    reason: str
    """What the next number of nodes would do; "" where nothing that divides the batch goes past it."""


def find_limit(estimates: Sequence[Estimate]) -> Limit:
    """The last node count before one that adds less than LEAST_GAIN, or takes efficiency below LEAST_EFFICIENCY."""
    first = estimates[0]
    for here, following in itertools.pairwise(estimates):
        doublings = math.log2(following.num_nodes / here.num_nodes)
        gain = (following.images_per_second / here.images_per_second) ** (1 / doublings) - 1
        efficiency = efficiency_of(following, first)
        if gain < LEAST_GAIN:
            change = f"{gain:.0%} more" if gain > 0 else f"{-gain:.0%} less"
            return Limit(here.num_nodes, f"{following.num_nodes} give {change} images/s")
        if efficiency < LEAST_EFFICIENCY:
            return Limit(
                here.num_nodes,
                f"with {following.num_nodes} a node does {efficiency:.0%} of what {first.num_nodes} alone does",
            )
    return Limit(estimates[-1].num_nodes, "")


def efficiency_of(estimate: Estimate, first: Estimate) -> float:
    """Images/s of a node against those of a node of `first`, the smallest cluster."""
    return (estimate.images_per_second / estimate.num_nodes) / (first.images_per_second / first.num_nodes)
