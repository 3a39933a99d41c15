"""Count what a training step of a network sends, computes and launches, on tensors without memory.

The layout is the optimizer's (`make_buckets`), so padding and order are those of the run.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitfleet.models import check_images, create_model
from bitfleet.models.size import layer_macs
from bitfleet.optim import build_optimizer
from bitfleet.optim.sharding.buckets import make_buckets
from bitfleet.optim.sharding.optimizer import BUCKET_NUMEL
from bitfleet.optim.sharding.reduction import can_halve
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.distillation.teacher import create_teacher

Kind = Literal["halving", "all_to_all", "all_gather", "all_reduce"]


class Message(NamedTuple):
    """A collective of a step."""

    kind: Kind
    whole_bytes: float
    """Bytes of the tensor; of an all-gather those of its output."""
    ready: float = 1.0
    """Part of the backward pass after which it can leave."""

    def sent_bytes(self, world_size: int) -> float:
        """Return the bytes that each rank sends; an all-reduce is a reduce-scatter and an
        all-gather."""
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * (world_size - 1) / world_size * self.whole_bytes

    def between_bytes(self, num_nodes: int, ranks_per_node: int) -> float:
        """Return the bytes that leave each node; a ring leaves it once, a flat all-to-all once per
        rank."""
        world_size = num_nodes * ranks_per_node
        if num_nodes == 1:
            return 0.0
        if self.kind == "halving":  # the ranks of a node have halved the tensor among themselves before
            return (num_nodes - 1) / num_nodes * self.whole_bytes
        if self.kind == "all_to_all":
            return ranks_per_node * (world_size - ranks_per_node) / world_size * self.whole_bytes
        return self.sent_bytes(world_size)


class Traffic(NamedTuple):
    """The messages of a step, in the order in which they leave."""

    gradients: list[Message]
    """Messages that travel during backward, as soon as they are ready."""
    after: list[Message]
    """Messages after backward that all ranks wait for: agreement, weights, BatchNorm's
    statistics."""

    def sent_bytes(self, world_size: int) -> float:
        """Return the bytes that each rank sends per step."""
        return sum(message.sent_bytes(world_size) for message in (*self.gradients, *self.after))


class TeacherCost(NamedTuple):
    """Cost of calling a teacher; 0 without one."""

    macs: int
    """Multiply-accumulates per image."""
    num_operators: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Facts about the network of a run."""

    config: TrainConfig
    model: nn.Module
    """On the meta device."""
    groups: list[dict[str, Any]]
    """Parameter groups of its optimizer, on the meta device."""
    macs: int
    """Multiply-accumulates per image, forward."""
    ready: dict[nn.Parameter, float]
    """Parameter -> part of the backward pass (of its multiply-accumulates) after which its gradient
    is there."""

    @functools.cached_property
    def num_operators(self) -> int:
        """Operators of an eager forward and backward; a CUDA kernel each, or nearly."""
        size = self.config.data.image_size
        self.model.train()
        counter = _OperatorCounter()
        with counter:
            torch.autograd.backward(self.model(torch.empty((2, 3, size, size), device="meta")).sum())
        self.model.zero_grad()
        return counter.count

    @functools.cached_property
    def teacher(self) -> TeacherCost:
        """Cost of the teacher, if the run calls one."""
        config, size = self.config, self.config.data.image_size
        if not config.distill.teacher or config.distill.cache is not None:
            return TeacherCost(0, 0)
        with torch.device("meta"):
            teacher = create_teacher(config.distill.teacher, config.model.num_classes).eval()
        counter = _OperatorCounter()
        with counter, torch.no_grad():
            teacher(torch.empty((2, 3, size, size), device="meta"))
        return TeacherCost(sum(layer_macs(teacher, (3, size, size)).values()), counter.count)

    @property
    def num_statistics(self) -> int:
        """Elements of BatchNorm's running statistics."""
        return sum(buffer.numel() for buffer in self.model.buffers() if buffer.is_floating_point())

    @property
    def num_parameters(self) -> int:
        """Elements of all trained parameters."""
        return sum(param.numel() for group in self.groups for param in group["params"])


class _OperatorCounter(TorchDispatchMode):
    """Count the operators that run inside, without views and allocations."""

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator `func`."""
        self.count += not (func.is_view or torch.Tag.inplace_view in func.tags or "empty" in func._schema.name)
        return func(*args, **(kwargs or {}))


def describe(config: TrainConfig) -> Network:
    """Return the facts about the network of `config`; its weights take no memory.

    Raises:
        ValueError: there is no such network, or its images are too small for it.
    """
    check_images(config.model, config.data.image_size, 2)
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
    return Network(config=config, model=model, groups=optimizer.param_groups, macs=total, ready=ready)


def traffic(network: Network, config: TrainConfig, world_size: int) -> Traffic:
    """Return the messages of an ordinary step: no logging, no saving, no `check_every_steps`. One
    rank sends none.

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
        value_bytes = 2 if config.engine.grad_comm_dtype == "bf16" else 4
        kind: Kind = "halving" if can_halve(world_size) else "all_to_all"
        gradients, gathers, ready = [], [], 0.0
        for bucket in make_buckets(network.groups, BUCKET_NUMEL, 0, world_size):
            # Sent in one order: a bucket waits for those before it.
            ready = max([ready, *(network.ready[segment.param] for segment in bucket.segments)])
            numel = world_size * bucket.slice_numel
            gradients.append(Message(kind, value_bytes * numel, ready))
            gathers.append(Message("all_gather", numel / 8 if bucket.binary else 4 * numel))
        num_tensors = sum(len(group["params"]) for group in network.groups)
        num_flags = 2 + num_tensors + (2 if config.optim.transitions.drives != "off" else 0)
        return Traffic(gradients, [Message("all_reduce", 4 * num_flags), *gathers, *control])
    if sharding == "zero3":
        raise ValueError('the plan knows engine.sharding "bits", "none", "zero1" and "zero2", not "zero3"')
    # DeepSpeed's buckets are as large as the network (engine.py), so they leave at the end of
    # backward.
    whole = Message("all_reduce", 4 * network.num_parameters)
    gathers = [] if sharding == "none" else [Message("all_gather", whole.whole_bytes)]
    return Traffic([whole], [*gathers, *control])
