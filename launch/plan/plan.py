"""Predict the time of a training step on a cluster, and what binds it, from a run's configuration
and a machine's rates.

What overlaps is as in the trainer. Images are decoded and copied during the step before, and a
bucket of gradients travels during backward; agreement, update, weights and running statistics come
after, one after the other. Meanwhile the host of a GPU launches the kernels to come. On a CPU
decoding, launches and copies inside a node share the cores, so only what crosses a link between
nodes overlaps.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from bitfleet.launch.plan.rates import FLOP_PER_FORWARD_MAC, FLOP_PER_MAC, Rates
from bitfleet.launch.plan.traffic import Message, Network, traffic
from bitfleet.trainer.config import TrainConfig, resolve_replicas
from bitfleet.trainer.engine.config import EngineConfig

Resource = Literal["data", "compute", "launches", "network", "update"]
BACKWARD_SHARE = 2 / 3
"""Part of forward and backward: gradients of inputs and of weights, against one pass."""
LEAST_GAIN, LEAST_EFFICIENCY = 0.05, 0.5
"""More nodes do not help if doubling them adds less than the first, or leaves less than the second
of each node's images/s."""
SCAN_LIMIT = 1024
"""Largest number of nodes that is looked at."""
KERNELS_PER_TENSOR, KERNELS_PER_STEP = 2, 60
"""Assumed launches besides forward and backward: a gradient into its bucket and its share of the
update; finite check, metrics, statistics and collectives."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal nodes on a network without a bottleneck."""

    num_nodes: int
    ranks_per_node: int
    """GPUs per node; on a CPU the ranks that share its cores."""
    link_bytes_per_second: float
    """Bandwidth of a node's connection, in each direction; infinite if there is none."""
    cores: float
    """CPU cores per node."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.ranks_per_node

    def message_seconds(self, message: Message, rates: Rates) -> float:
        """Return the seconds of one collective: its rounds, and the slower of the link between
        nodes and the ways inside of one."""
        between = message.between_bytes(self.num_nodes, self.ranks_per_node)
        within = self.ranks_per_node * message.sent_bytes(self.world_size) - between
        devices = self.ranks_per_node if rates.device == "gpu" else self.cores
        return rates.latency_seconds * math.log2(self.world_size) + max(
            between / (self.link_bytes_per_second * rates.link_efficiency),
            within / (devices * rates.local_bytes_per_second),
        )


class Estimate(NamedTuple):
    """A step on a cluster; all times in seconds."""

    num_nodes: int
    world_size: int
    images_per_rank: int
    data: float
    """Decoding; hidden behind the rest on a GPU."""
    compute: float
    """Forward and backward."""
    launches: float
    """Python and kernel launches; on a GPU hidden behind all that the device does."""
    gradients: float
    """Exchange of gradients, all of it."""
    network: float
    """Part of `gradients` that backward does not hide; agreement, weights and running
    statistics."""
    update: float
    step: float
    images_per_second: float
    sent_bytes: float
    """Bytes that each rank sends."""
    between_bytes: float
    """Bytes that each node sends to others."""
    binding: Resource
    """The resource that dominates the step."""


def estimate(config: TrainConfig, network: Network, rates: Rates, cluster: Cluster) -> Estimate:
    """Predict a step.

    Raises:
        ValueError: batch, replicas and ranks do not divide, or the sharding's traffic is not known.
    """
    world_size, on_gpu = cluster.world_size, rates.device == "gpu"
    num_micro_batches = resolve_replicas(config, world_size) // world_size
    images_per_rank = config.global_batch_size // world_size
    share = 1.0 if on_gpu else cluster.ranks_per_node / cluster.cores  # ranks per device
    data = _data_seconds(config, rates, cluster, images_per_rank)
    flops = FLOP_PER_MAC * network.macs + FLOP_PER_FORWARD_MAC * network.teacher.macs
    compute = share * images_per_rank * flops / rates.flops_per_second
    launches = share * _launch_seconds(config, network, rates, num_micro_batches)
    passes = compute if on_gpu else compute + launches

    messages = traffic(network, config, world_size)
    hides = on_gpu or cluster.num_nodes > 1
    gradients, exposed = _gradient_seconds(
        [(cluster.message_seconds(message, rates), message.ready if hides else 1.0) for message in messages.gradients],
        BACKWARD_SHARE * passes / num_micro_batches,
    )
    sent = exposed + sum(cluster.message_seconds(message, rates) for message in messages.after)
    owned = network.num_parameters / (1 if config.engine.sharding == "none" else world_size)
    rule_ns = rates.update_ns if config.engine.sharding == "bits" else rates.plain_update_ns
    update = share * 1e-9 * (network.num_parameters * rates.whole_ns + owned * rule_ns)

    rest = passes + sent + update
    step = max(data, launches, rest) if on_gpu else data + rest
    on_device: dict[Resource, float] = {"network": sent, "update": update, "compute": compute}
    by_host: dict[Resource, float] = {"data": data, "launches": launches}
    hidden_host = on_gpu and max(data, launches) <= rest
    candidates = on_device if hidden_host else by_host if on_gpu else on_device | by_host
    return Estimate(
        num_nodes=cluster.num_nodes,
        world_size=world_size,
        images_per_rank=images_per_rank,
        data=data,
        compute=compute,
        launches=launches,
        gradients=gradients,
        network=sent,
        update=update,
        step=step,
        images_per_second=config.global_batch_size / step,
        sent_bytes=messages.sent_bytes(world_size),
        between_bytes=sum(
            message.between_bytes(cluster.num_nodes, cluster.ranks_per_node)
            for message in (*messages.gradients, *messages.after)
        ),
        binding=max(candidates, key=candidates.__getitem__),
    )


def _launch_seconds(config: TrainConfig, network: Network, rates: Rates, num_micro_batches: int) -> float:
    """Return the time in which a step's kernels are launched, by a host or in one CUDA graph.

    On a CPU only forward and backward: the update's rate contains what it costs to start.
    """
    kernels = num_micro_batches * network.num_operators
    if rates.device == "gpu":
        kernels += KERNELS_PER_TENSOR * len(network.ready) + KERNELS_PER_STEP
    eager = num_micro_batches * network.teacher.num_operators  # the teacher is called outside of a graph
    per_kernel = rates.node_seconds if config.engine.cuda_graph else rates.launch_seconds
    return kernels * per_kernel + eager * rates.launch_seconds


def _data_seconds(config: TrainConfig, rates: Rates, cluster: Cluster, images_per_rank: int) -> float:
    """Return the seconds in which the next batch of a rank is decoded."""
    ranks_per_core = cluster.ranks_per_node / cluster.cores
    if rates.device == "cpu":
        return ranks_per_core * images_per_rank * rates.decode_seconds
    if config.data.loader == "memory":
        return 0.0
    if config.data.device == "cpu" or config.data.loader == "torch":
        return ranks_per_core * images_per_rank * rates.core_decode_seconds
    return images_per_rank * rates.decode_seconds


def _gradient_seconds(messages: Sequence[tuple[float, float]], backward: float) -> tuple[float, float]:
    """Return the seconds of the exchange of gradients, and the part that `backward`, in seconds,
    does not hide.

    Args:
        messages: seconds of each message, and the part of backward after which it may leave.
        backward: seconds of the last micro-batch's backward.
    """
    ends_at = 0.0
    for seconds, ready in messages:
        ends_at = max(ends_at, ready * backward) + seconds
    return sum(seconds for seconds, _ in messages), max(0.0, ends_at - backward)


def scan(config: TrainConfig, network: Network, rates: Rates, cluster: Cluster) -> list[Estimate]:
    """Return estimates for 1, 2, 4, ... nodes, while the batch divides, and for those of `cluster`.

    Raises:
        ValueError: see `estimate`, about `cluster` itself.
    """
    estimates = {cluster.num_nodes: estimate(config, network, rates, cluster)}
    num_nodes = 1
    while num_nodes <= SCAN_LIMIT and num_nodes * cluster.ranks_per_node <= config.global_batch_size:
        other = dataclasses.replace(cluster, num_nodes=num_nodes)
        with contextlib.suppress(ValueError):  # ranks that the batch does not divide over; the asked number was fine
            estimates.setdefault(num_nodes, estimate(config, network, rates, other))
        num_nodes *= 2
    return [estimates[num_nodes] for num_nodes in sorted(estimates)]


def alternatives(config: TrainConfig, network: Network, rates: Rates, cluster: Cluster) -> dict[str, Estimate]:
    """Return the estimate with each option that a run could have instead."""
    engine = config.engine
    options: dict[str, Callable[[], EngineConfig]] = {
        "--engine.grad_comm_dtype bf16": lambda: dataclasses.replace(engine, grad_comm_dtype="bf16"),
        "--engine.sharding none": lambda: EngineConfig(sharding="none"),
        "--engine.sharding zero1": lambda: EngineConfig(sharding="zero1"),
    }
    if rates.device == "gpu" and cluster.world_size == 1:
        options["--engine.cuda_graph True"] = lambda: dataclasses.replace(engine, cuda_graph=True)
    results = {}
    for option, changed in options.items():
        try:
            other = dataclasses.replace(config, engine=changed())
        except ValueError:  # another setting of the run needs what it has
            continue
        kinds = [(each.sharding, each.grad_comm_dtype, each.cuda_graph) for each in (engine, other.engine)]
        if kinds[0] != kinds[1]:
            results[option] = estimate(other, network, rates, cluster)
    return results


def find_limit(estimates: Sequence[Estimate]) -> tuple[int, str]:
    """Return the number of nodes beyond which more do not help, and why; "" if the batch divides no
    further."""
    first = estimates[0]
    for current, following in itertools.pairwise(estimates):
        doublings = math.log2(following.num_nodes / current.num_nodes)
        gain = (following.images_per_second / current.images_per_second) ** (1 / doublings) - 1
        efficiency = efficiency_of(following, first)
        if gain < LEAST_GAIN:
            change = "no more" if abs(gain) < 0.005 else f"{gain:.0%} more" if gain > 0 else f"{-gain:.0%} less"
            return current.num_nodes, f"{following.num_nodes} give {change} images/s"
        if efficiency < LEAST_EFFICIENCY:
            reason = f"with {following.num_nodes} a node does {efficiency:.0%} of what {first.num_nodes} alone does"
            return current.num_nodes, reason
    return estimates[-1].num_nodes, ""


def efficiency_of(estimate: Estimate, first: Estimate) -> float:
    """Return images/s per node relative to those of `first`, the smallest cluster."""
    return (estimate.images_per_second / estimate.num_nodes) / (first.images_per_second / first.num_nodes)
