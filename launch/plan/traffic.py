"""What the plan knows of a network, and what a step of it sends: the messages of each sharding, and the bytes of each.

The layout is the optimizer's own (`make_buckets` on parameters without storage), so padding and order are those of the run.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from bitfleet.launch.data.imagenet import ILSVRC2012
from bitfleet.launch.plan.launches import Passes, count_passes
from bitfleet.models import create_model
from bitfleet.models.size import layer_macs
from bitfleet.optim import build_optimizer
from bitfleet.optim.sharding.buckets import make_buckets
from bitfleet.optim.sharding.exchange import can_halve
from bitfleet.optim.sharding.optimizer import BUCKET_NUMEL
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig, open_dataset

IMAGENET_IMAGES = ILSVRC2012.train
Kind = Literal["halving", "all_to_all", "all_gather", "all_reduce"]
PASSES: dict[Kind, int] = {"halving": 1, "all_to_all": 1, "all_gather": 1, "all_reduce": 2}
"""Times (N - 1) / N of the whole tensor that a rank sends; an all-reduce is a reduce-scatter and an all-gather."""


class Message(NamedTuple):
    """One collective of a step."""

    kind: Kind
    whole_bytes: float
    """Of an all-gather the output."""
    ready: float = 1.0
    """Part of the backward pass after which it can leave."""

    def sent_bytes(self, world_size: int) -> float:
        """What each of `world_size` ranks sends."""
        return PASSES[self.kind] * (world_size - 1) / world_size * self.whole_bytes

    def between_bytes(self, num_nodes: int, ranks_per_node: int) -> float:
        """What leaves a node for others: of a ring one pass, of a flat all-to-all what each of its ranks sends elsewhere.

        Halving leaves a node when each of its ranks has 1 / ranks_per_node left to swap.
        """
        world_size = num_nodes * ranks_per_node
        if num_nodes == 1:
            return 0.0
        if self.kind == "halving":
            return (num_nodes - 1) / num_nodes * self.whole_bytes
        if self.kind == "all_to_all":
            return ranks_per_node * (world_size - ranks_per_node) / world_size * self.whole_bytes
        return self.sent_bytes(world_size)


class Traffic(NamedTuple):
    """The messages of a step, in the order in which they leave."""

    gradients: list[Message]
    """They may travel while backward goes on, as far as they are ready."""
    after: list[Message]
    """What all ranks wait for after backward: agreement, weights, BatchNorm's statistics."""

    def sent_bytes(self, world_size: int) -> float:
        """What a rank sends in a step."""
        return sum(message.sent_bytes(world_size) for message in (*self.gradients, *self.after))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """What the plan needs to know of a network."""

    groups: list[dict[str, Any]]
    """Parameter groups of its optimizer, on the device "meta"."""
    macs: int
    """Multiply-accumulates of one image, forward."""
    passes: Passes
    """Kernels that a micro-batch launches."""
    num_statistics: int
    """Elements of BatchNorm's running statistics."""
    ready: dict[nn.Parameter, float]
    """Parameter -> part of the backward pass (of its multiply-accumulates) after which its gradient is there."""

    @property
    def num_parameters(self) -> int:
        """Weights of all groups."""
        return sum(param.numel() for group in self.groups for param in group["params"])

    @property
    def num_tensors(self) -> int:
        """Parameters of all groups."""
        return sum(len(group["params"]) for group in self.groups)


def describe(config: TrainConfig) -> Network:
    """The network of `config`, without memory for its weights.

    Raises:
        ValueError: there is no such network.
    """
    with torch.device("meta"):
        model = create_model(config.model)
        size = config.data.image_size
        by_layer = layer_macs(model, (3, size, size))
    optimizer, _ = build_optimizer(model, config.optim, num_steps=1)
    total, done = sum(by_layer.values()), 0
    ready: dict[nn.Parameter, float] = {}
    for module in reversed(list(model.modules())):
        done += by_layer.get(module, 0)
        ready |= {param: done / max(total, 1) for param in module.parameters(recurse=False)}
    return Network(
        groups=optimizer.param_groups,
        macs=total,
        passes=count_passes(model, config),
        num_statistics=sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point()),
        ready=ready,
    )


def traffic(network: Network, config: TrainConfig, world_size: int) -> Traffic:
    """The messages of a step on `world_size` ranks; none on a single rank.

    Logging steps and the check of the weights (`check_every_steps`) add a few more, which are left out.

    Raises:
        ValueError: sharding zero3, whose traffic is not known here.
    """
    if world_size == 1:
        return Traffic([], [])
    sharding = config.engine.sharding
    control = [Message("all_reduce", 24)]  # stop.py: three integers; after quick steps not after each
    if network.num_statistics:
        control.append(Message("all_gather", 4 * network.num_statistics * world_size))
    if sharding == "bits":
        dtype = torch.bfloat16 if config.engine.grad_comm_dtype == "bf16" else torch.float32
        kind: Kind = "halving" if can_halve(world_size) else "all_to_all"
        buckets = make_buckets(network.groups, BUCKET_NUMEL, 0, world_size)
        gradients, gathers, reached = [], [], 0.0
        for bucket in buckets:
            # Sent in one order: a bucket waits for those before it.
            reached = max([reached, *(network.ready[segment.param] for segment in bucket.segments)])
            numel = world_size * bucket.slice_numel
            gradients.append(Message(kind, dtype.itemsize * numel, reached))
            gathers.append(Message("all_gather", numel / 8 if bucket.binary else 4 * numel))
        num_facts = 2 + network.num_tensors + (2 if config.optim.transitions.drives != "off" else 0)
        return Traffic(gradients, [Message("all_reduce", 4 * num_facts), *gathers, *control])
    if sharding == "zero3":
        raise ValueError('the plan knows engine.sharding "bits", "none", "zero1" and "zero2", not "zero3"')
    # DeepSpeed's buckets are as large as the network (engine.py), so they leave at the end of backward.
    whole = 4 * network.num_parameters
    gathers = [Message("all_gather", whole)] if sharding in ("zero1", "zero2") else []
    return Traffic([Message("all_reduce", whole)], [*gathers, *control])


def count_images(config: DataConfig) -> int:
    """Training images of `config.root` where it is on this machine, else those of ImageNet, which most plans are about."""
    try:
        return len(open_dataset(config).train)
    except ValueError:
        return IMAGENET_IMAGES
