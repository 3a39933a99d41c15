"""Count the kernels that a training step launches on a GPU, without a GPU.

Forward, loss and backward of a micro-batch run on the meta device, whose tensors have shapes but no
memory, under a dispatch mode that sees every operator. The launches of the optimizer and of the
exchange between ranks follow from the buckets. No count depends on the number of images.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bitfleet.optim.rules.rule import RULES, Group, numbers_of
from bitfleet.optim.sharding.buckets import Bucket, make_buckets
from bitfleet.optim.sharding.optimizer import BUCKET_NUMEL
from bitfleet.optim.sharding.reduction import can_halve
from bitfleet.trainer.config import TrainConfig, resolve_replicas
from bitfleet.trainer.data import normalize
from bitfleet.trainer.metrics import AccuracyMeter

FREE = (
    "_unsafe_view lift_fresh empty empty_like empty_strided new_empty new_empty_strided _local_scalar_dense"
).split()
"""Operators that launch nothing, besides views: they make tensors without values, or copy one
number to the host."""
SEVERAL = {
    "constant_pad_nd": 2,  # fills the output, then copies the input into it
    "max_pool2d_with_indices_backward": 2,  # zeros, then the gradients of the largest elements
    "nll_loss_backward": 2,  # the same
    "native_layer_norm_backward": 3,  # the input's gradient; the factor's and the offset's in two stages
    "topk": 2,  # selects, then sorts
}
"""Operators whose CUDA code launches several kernels whatever their arguments; any other launches
one."""
LIBRARY = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
"""Operators that compiled code calls from cuDNN and cuBLAS."""
REDUCTIONS = {
    "native_batch_norm": 2,  # over batch and pixels, in two stages
    "native_batch_norm_backward": 2,  # the same
    "native_layer_norm_backward": 2,  # the same, of the factor's and the offset's gradient
    "var": 1,
    "mean": 1,
    "sum": 1,
}
"""Operators that compiled code computes in separate kernels -> their number; what follows is
computed elementwise."""
WINDOWS = (
    "constant_pad_nd avg_pool2d avg_pool2d_backward max_pool2d_with_indices max_pool2d_with_indices_backward"
).split()
"""Operators that compiled code fuses with what follows, but not with what comes before: they read
neighbours."""

LOWERED = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOWERED_FUNCTIONS = (nn.functional.conv2d, nn.functional.linear, torch.matmul, torch.mm, torch.bmm)
RAISED_FUNCTIONS = (nn.functional.layer_norm,)

STATISTICS, FINITE, FINITE_OF_BUCKET, CLIP_OF_BUCKET, UNDO, ROUND = 2, 13, 2, 4, 3, 3
"""Kernels of the update and the exchange.

STATISTICS: per micro-batch, BatchNorm's running statistics are set to those of the step's start,
and kept for the mean. FINITE, FINITE_OF_BUCKET: the check of the gradients: operators on single
numbers and copies between host and device; a sum over each bucket and its addition. CLIP_OF_BUCKET:
square, sum, addition, scaling. UNDO: per tensor of a rule without a kernel on packed signs: copied,
chosen from, written, in case the step was not finite. ROUND: per bucket and round of the halving
exchange: what travels is copied, swapped, added.
"""


class Count(NamedTuple):
    """Kernels of the same operators in two modes."""

    eager: int
    compiled: int


class Passes(NamedTuple):
    """Kernels that one micro-batch launches."""

    forward: Count
    """Normalisation of the images, network, loss; only the network is compiled."""
    backward: Count
    metrics: int
    """Loss and hits, added up on the device."""
    num_counters: int
    """BatchNorms that count their batches."""


class Launches(NamedTuple):
    """Kernels that one rank launches per step."""

    forward: int
    """Per micro-batch, as backward and rest."""
    backward: int
    rest: int
    """Gradients into their buckets, running statistics, metrics."""
    update: int
    """Per step: sums over micro-batches, the check for finite gradients, rules, signs back into
    weights."""
    exchange: int
    """Per step: collectives, and what they copy and add; 0 on one rank."""
    num_micro_batches: int

    @property
    def micro_batch(self) -> int:
        """Kernels of one micro-batch."""
        return self.forward + self.backward + self.rest

    @property
    def step(self) -> int:
        """Kernels of a whole step."""
        return self.num_micro_batches * self.micro_batch + self.update + self.exchange


class LaunchCounter(TorchDispatchMode):
    """Count the kernels of all operators that run inside.

    Eager, each operator launches what torch's CUDA code does (`kernels_of`). Compiled is an
    estimate from the order of the operators: a call of cuDNN or cuBLAS stays; elementwise operators
    in a row become one kernel; reductions and windows (pools, padding) end such a row, and the
    elementwise operators after them start another. test_launches.py compares it with
    torch.compile's scheduler.

    Args:
        device: type of the device whose operators count; those on other devices (numbers on the
            CPU) launch nothing.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self._device = device
        self._eager = self._compiled = 0
        self._in_row = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator `func` and count its kernels."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        is_view = func.is_view or torch.Tag.inplace_view in func.tags
        outputs = [leaf for leaf in tree_leaves(args if result is None else result) if isinstance(leaf, Tensor)]
        if is_view or name in FREE or not any(output.device.type == self._device for output in outputs):
            return result
        num_kernels = kernels_of(name, args)
        self._eager += num_kernels
        if name in LIBRARY or name in REDUCTIONS:
            self._end_row()
            self._compiled += REDUCTIONS.get(name, num_kernels)
            self._in_row = name.startswith("native_")
        elif name in WINDOWS:
            self._end_row()
            self._in_row = True
        elif name == "copy_" or (len(outputs) == 1 and outputs[0].numel() == 1):
            # A gradient that autograd brings into its parameter's layout, or BatchNorm's count of
            # batches: not compiled.
            self._compiled += 1
        else:
            self._in_row = True
        if name == "convolution" and _is_last(args[0]):  # as on any other device
            return result.contiguous(memory_format=torch.channels_last)
        return result

    def _end_row(self) -> None:
        self._compiled += self._in_row
        self._in_row = False

    def take(self) -> Count:
        """Return the kernels since the last call."""
        self._end_row()
        count = Count(self._eager, self._compiled)
        self._eager = self._compiled = 0
        return count


def kernels_of(name: str, args: Sequence[Any]) -> int:
    """Return the number of kernels that torch's CUDA code launches for the operator aten::`name`
    with `args`.

    Read in torch's source (aten/src/ATen/native/cuda and cudnn), not measured.
    """
    # In channels_last, a convolution first copies a weight that is not.
    if name == "convolution":  # (input, weight, bias, ...)
        return 1 + (_is_last(args[0]) and not _is_last(args[1])) + (args[2] is not None)
    if name == "convolution_backward":  # (grad_output, input, weight, ..., output_mask): one kernel per gradient
        of_input, of_weight, of_bias = map(int, args[-1])
        return of_input * (1 + (_is_last(args[1]) and not _is_last(args[2]))) + of_weight + of_bias
    # cuDNN has BatchNorm as one kernel, but only with a factor; torch has statistics, running
    # statistics, result, and backward sums, result.
    if name == "native_batch_norm":  # (input, weight, ...)
        return 3 if args[1] is None else 1
    if name == "native_batch_norm_backward":  # (grad_output, input, weight, ...)
        return 2 if args[2] is None else 1
    return SEVERAL.get(name, 1)


def _is_last(tensor: Tensor) -> bool:
    """Return True if `tensor` is channels_last; a tensor of one pixel is that and contiguous as
    well."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


class _Autocast(TorchFunctionMode):
    """Converts arguments as torch.autocast does on CUDA; torch has no autocast for the meta
    device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = self._dtype if func in LOWERED_FUNCTIONS else torch.float32 if func in RAISED_FUNCTIONS else None
        if dtype is not None:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), (args, kwargs))
        return func(*args, **(kwargs or {}))


def autocast_on_meta(precision: str) -> AbstractContextManager[object]:
    """Enter `EngineConfig.precision` for a forward pass on the meta device."""
    return _Autocast(LOWERED[precision]) if precision in LOWERED else nullcontext()


def count_passes(model: nn.Module, config: TrainConfig) -> Passes:
    """Count what a micro-batch launches; `model`, on the meta device, is left in training mode and
    without gradients."""
    size = config.data.image_size
    dtype = torch.float32 if config.data.preprocessing == "official" else torch.uint8
    raw = torch.empty((2, size, size, 3), dtype=dtype, device="meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    meter = AccuracyMeter(torch.device("meta"))
    model.train()
    counter = LaunchCounter()
    with counter:
        for _ in range(2):  # the first pass also makes tables that are kept
            counter.take()
            images = normalize(raw, config.data.mean, config.data.std)
            before = counter.take()
            with autocast_on_meta(config.engine.precision):
                logits: Tensor = model(images)
            network = counter.take()
            loss = nn.functional.cross_entropy(logits.float(), labels)
            after = counter.take()
            torch.autograd.backward(loss)
            backward = counter.take()
            meter.add(loss, logits.detach(), labels)
            metrics = counter.take()
            model.zero_grad()
    outside = before.eager + after.eager
    forward = Count(network.eager + outside, network.compiled + outside)
    num_counters = sum(name.endswith("num_batches_tracked") for name, _ in model.named_buffers())
    return Passes(forward, backward, metrics.eager, num_counters)


def count_launches(
    passes: Passes, groups: Sequence[Group], config: TrainConfig, world_size: int, *, compiled: bool
) -> Launches:
    """Count what each of `world_size` ranks launches for a step without logging; roughly where
    DeepSpeed shards.

    Raises:
        ValueError: batch, replicas and ranks do not divide.
    """
    num_replicas = resolve_replicas(config, world_size)
    num_micro_batches = num_replicas // world_size
    num_tensors = sum(len(group["params"]) for group in groups)
    several, kept = world_size > 1, 0
    if config.engine.sharding == "bits":
        buckets = make_buckets(groups, BUCKET_NUMEL, 0, world_size)
        kept = len(buckets)  # each micro-batch starts with zeros
        sums = num_micro_batches - 1 + (num_replicas > 1)  # of micro-batches, and their mean
        update = FINITE + sum(sums + _update_of(bucket, config.engine.max_grad_norm is not None) for bucket in buckets)
        exchange = _exchange(buckets, world_size, rounded=config.engine.grad_comm_dtype == "bf16") if several else 0
    elif config.engine.sharding == "none":  # a rule per parameter; each gradient is copied out of the reduced bucket
        update = sum(len(group["params"]) * rule_launches(group) for group in groups)
        exchange = num_tensors + 3 if several else 0
    else:  # each gradient is copied into a flat slice of its group, whose norm is taken
        update = 2 * num_tensors + sum(rule_launches(group) + 2 for group in groups)
        exchange = 2 * len(groups) if several else 0
    if num_replicas > 1 and passes.num_counters:
        # The mean of BatchNorm's running statistics over all replicas: sums, division, copy, and
        # the counters of batches.
        counters = passes.num_counters if num_micro_batches > 1 else 0
        update += num_micro_batches - 1 + (world_size if several else 0) + 2 + counters
    return Launches(
        forward=passes.forward.compiled if compiled else passes.forward.eager,
        backward=passes.backward.compiled if compiled else passes.backward.eager,
        rest=kept + num_tensors + STATISTICS + passes.metrics,
        update=update,
        exchange=exchange,
        num_micro_batches=num_micro_batches,
    )


def rule_launches(group: Group) -> int:
    """Count one update of a tensor by the group's rule in eager torch."""
    rule = RULES[group["rule"]]
    weight, grad, *state = (torch.empty(8, device="meta") for _ in range(2 + len(rule.state_keys)))
    counter = LaunchCounter()
    with counter, torch.no_grad():
        values = dict(zip(rule.state_keys, state, strict=True)) | {"step": torch.tensor(2.0)}
        rule.update_(weight, grad, values, group | numbers_of(group, 2))
    return counter.take().eager


def _update_of(bucket: Bucket, clips: bool) -> int:
    """Count the check, clipping and rule of a bucket, and signs into weights."""
    kernels = FINITE_OF_BUCKET + (CLIP_OF_BUCKET if clips and bucket.is_clipped else 0)
    undone = UNDO * (1 + len(bucket.state))
    if not bucket.binary:
        return kernels + rule_launches(bucket.group) + undone
    # A kernel on packed signs, or signs to weights, the rule, and weights to signs; then signs into
    # the network's weights.
    rule = 1 if bucket.rule.update_bits_ is not None else 1 + rule_launches(bucket.group) + 1 + undone
    return kernels + rule + 1


def _exchange(buckets: Sequence[Bucket], world_size: int, *, rounded: bool) -> int:
    """Count gradients on their way into each rank's slice, weights on their way back, and the
    agreement."""
    all_to_all = rounded + 1 + (world_size - 1)  # conversion, exchange, sum in a tree
    reduction = ROUND * (world_size.bit_length() - 1) if can_halve(world_size) else all_to_all
    gathers = sum(1 if bucket.binary else 2 for bucket in buckets)  # values are copied out of the way first
    return 1 + len(buckets) * reduction + gathers
