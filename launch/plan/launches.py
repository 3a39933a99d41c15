"""Count the kernels that a training step launches on a GPU, without a GPU.

Forward, loss and backward of a micro-batch run on the meta device, whose tensors have shapes but no memory, under a dispatch mode
that sees every operator. What the optimizer and the exchange between ranks launch follows from the buckets, because their kernels
work on whole buckets. No count depends on the number of images.

The eager count takes each operator as the kernels that torch's CUDA code launches for it (`kernels_of`). The compiled count is an
estimate of what torch.compile makes of the same operators: see `LaunchCounter`.
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
"""Operators that launch nothing, besides views: they make tensors without values, or copy one number to the host."""

SEVERAL = {
    "constant_pad_nd": 2,  # fills the output, then copies the input into it
    "max_pool2d_with_indices_backward": 2,  # zeros, then the gradients of the largest elements
    "nll_loss_backward": 2,  # the same
    "native_layer_norm_backward": 3,  # the input's gradient; the factor's and the offset's in two stages
    "topk": 2,  # selects, then sorts
}
"""Operators whose CUDA code launches several kernels whatever their arguments; any other launches one."""

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
"""Operators that compiled code computes in kernels of their own -> how many; what follows is computed elementwise."""
WINDOWS = (
    "constant_pad_nd",
    "avg_pool2d",
    "avg_pool2d_backward",
    "max_pool2d_with_indices",
    "max_pool2d_with_indices_backward",
)
"""Operators that compiled code fuses with what follows, but not with what comes before: they read neighbours."""

LOWERED = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that autocast converts to."""
LOWERED_FUNCTIONS = (nn.functional.conv2d, nn.functional.linear, torch.matmul, torch.mm, torch.bmm)
RAISED_FUNCTIONS = (nn.functional.layer_norm,)

STATISTICS = 2
"""Of a micro-batch: BatchNorm's running statistics are set to those of the step's start, and kept for the mean."""
FINITE_OF_BUCKET, FINITE = 2, 13
"""Whether all gradients are finite: a sum over each bucket and its addition, then operators on single numbers, the copy of the
flag to the host and that of the step's numbers to the device."""
UNDO = 3
"""For each tensor of a rule without a kernel on packed signs: copied, chosen from, written, in case the step was not finite."""
CLIP_OF_BUCKET = 4
"""Clipping to a norm: square, sum, addition, scaling."""
FLIP, PACK, UNPACK = 1, 1, 1
"""Kernels on packed signs, one launch per bucket: the update of a rule that has one, weights to bits, bits to weights."""
ROUND = 3
"""A round of the halving exchange: what travels is copied, swapped, added."""


class Count(NamedTuple):
    """Kernels of the same operators in two modes."""

    eager: int
    compiled: int


class Passes(NamedTuple):
    """What one micro-batch launches."""

    forward: Count
    """Normalisation of the images, network, loss; only the network is compiled."""
    backward: Count
    """Up to the gradients of the parameters."""
    metrics: int
    """Loss and hits, added up on the device."""
    num_counters: int
    """BatchNorms that count their batches."""


class Launches(NamedTuple):
    """Kernels that one rank launches for a step."""

    forward: int
    """Of one micro-batch, as are the next two."""
    backward: int
    rest: int
    """Gradients into their buckets, running statistics, metrics."""
    update: int
    """Of a step: sums over micro-batches, the check for finite gradients, rules, signs back into weights."""
    exchange: int
    """Of a step: collectives, and what they copy and add; 0 on one rank."""
    num_micro_batches: int

    @property
    def micro_batch(self) -> int:
        """Of one micro-batch."""
        return self.forward + self.backward + self.rest

    @property
    def step(self) -> int:
        """Of a whole step."""
        return self.num_micro_batches * self.micro_batch + self.update + self.exchange


class LaunchCounter(TorchDispatchMode):
    """Count the kernels of all operators that run while it is entered.

    The compiled count applies three rules to the order of the operators: a call of cuDNN or cuBLAS stays; elementwise operators
    in a row become one kernel; reductions and windows (pools, padding) end such a row, and the elementwise operators after them
    start another. Checked against torch.compile's own scheduler in tests/unit/launch/plan/test_launches.py.

    Args:
        device: type of the device whose operators count; those on other devices (numbers on the CPU) launch nothing.
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
        if name in LIBRARY:
            self._end_row()
            self._compiled += num_kernels
        elif name in REDUCTIONS:
            self._end_row()
            self._compiled += REDUCTIONS[name]
            self._in_row = name.startswith("native_")
        elif name in WINDOWS:
            self._end_row()
            self._in_row = True
        elif name == "copy_" or (len(outputs) == 1 and outputs[0].numel() == 1):
            # Of autograd, a gradient into its parameter's layout, behind the compiled code; or of BatchNorm, a count of batches.
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
        """The kernels since the last call."""
        self._end_row()
        count = Count(self._eager, self._compiled)
        self._eager = self._compiled = 0
        return count


def kernels_of(name: str, args: Sequence[Any]) -> int:
    """How many kernels torch's CUDA code launches for the operator `name` of aten, called with `args`.

    Read in torch's source (aten/src/ATen/native/cuda and cudnn), not measured.
    """
    # In channels_last, a convolution first copies a weight that is not.
    if name == "convolution":  # (input, weight, bias, ...)
        return 1 + (_is_last(args[0]) and not _is_last(args[1])) + (args[2] is not None)
    if name == "convolution_backward":  # (grad_output, input, weight, ..., output_mask): one kernel for each gradient
        of_input, of_weight, of_bias = map(int, args[-1])
        return of_input * (1 + (_is_last(args[1]) and not _is_last(args[2]))) + of_weight + of_bias
    # cuDNN has BatchNorm as one kernel, but only with a factor; torch's own are statistics, running statistics, result, and
    # backward sums, result.
    if name == "native_batch_norm":  # (input, weight, ...)
        return 3 if args[1] is None else 1
    if name == "native_batch_norm_backward":  # (grad_output, input, weight, ...)
        return 2 if args[2] is None else 1
    return SEVERAL.get(name, 1)


def _is_last(tensor: Tensor) -> bool:
    """Whether `tensor` is channels_last; of one pixel a tensor is that and contiguous as well."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


class _Autocast(TorchFunctionMode):
    """Convert arguments as torch.autocast does on CUDA; torch has no autocast for the meta device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` with arguments of the type that autocast gives it."""
        dtype = self._dtype if func in LOWERED_FUNCTIONS else torch.float32 if func in RAISED_FUNCTIONS else None
        if dtype is not None:
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), (args, kwargs))
        return func(*args, **(kwargs or {}))


def autocast_on_meta(precision: str) -> AbstractContextManager[object]:
    """Enter `EngineConfig.precision` for a forward pass on the meta device."""
    return _Autocast(LOWERED[precision]) if precision in LOWERED else nullcontext()


def count_passes(model: nn.Module, config: TrainConfig) -> Passes:
    """Count what a micro-batch of `config` launches.

    Args:
        model: the network, on the meta device; left in training mode and without gradients.
        config: the run.
    """
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
    return Passes(
        Count(network.eager + outside, network.compiled + outside),
        backward,
        metrics.eager,
        sum(name.endswith("num_batches_tracked") for name, _ in model.named_buffers()),
    )


def count_launches(
    passes: Passes, groups: Sequence[Group], config: TrainConfig, world_size: int, *, compiled: bool
) -> Launches:
    """Count what one of `world_size` ranks launches for a step without logging.

    Where DeepSpeed shards (none, zero1 to zero3) the count is rough: a kernel per parameter and micro-batch, and `_deepspeed`.

    Args:
        passes: of its micro-batches.
        groups: parameter groups of its optimizer, on the meta device.
        config: the run.
        world_size: number of ranks.
        compiled: whether the network is.

    Raises:
        ValueError: batch, replicas and ranks do not divide.
    """
    num_replicas = resolve_replicas(config, world_size)
    num_micro_batches = num_replicas // world_size
    num_tensors = sum(len(group["params"]) for group in groups)
    means = _statistics_of_step(passes, num_micro_batches, world_size) if num_replicas > 1 else 0
    if config.engine.sharding == "bits":
        buckets = make_buckets(groups, BUCKET_NUMEL, 0, world_size)
        kept = len(buckets)  # each micro-batch starts with zeros
        own = num_micro_batches - 1 + (num_replicas > 1)  # sums of micro-batches, and their mean
        update = FINITE + sum(own + _update_of(bucket, config.engine.max_grad_norm is not None) for bucket in buckets)
        exchange = _exchange(buckets, world_size, rounded=config.engine.grad_comm_dtype == "bf16")
    else:
        kept = 0
        update, exchange = _deepspeed(groups, config.engine.sharding, world_size)
    return Launches(
        forward=passes.forward.compiled if compiled else passes.forward.eager,
        backward=passes.backward.compiled if compiled else passes.backward.eager,
        rest=kept + num_tensors + STATISTICS + passes.metrics,
        update=update + means,
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
    """Of a bucket: check, clipping, rule, signs into weights."""
    kernels = FINITE_OF_BUCKET + (CLIP_OF_BUCKET if clips and bucket.is_clipped else 0)
    undone = UNDO * (1 + len(bucket.state))
    if not bucket.binary:
        return kernels + rule_launches(bucket.group) + undone
    rule = FLIP if bucket.rule.update_bits_ is not None else UNPACK + rule_launches(bucket.group) + PACK + undone
    return kernels + rule + UNPACK


def _exchange(buckets: Sequence[Bucket], world_size: int, *, rounded: bool) -> int:
    """Of the gradients' way into each rank's slice, of the weights' way back, and of what the ranks agree on."""
    if world_size == 1:
        return 0
    all_to_all = rounded + 1 + (world_size - 1)  # conversion, exchange, sum in a tree
    reduction = ROUND * (world_size.bit_length() - 1) if can_halve(world_size) else all_to_all
    gathers = sum(1 if bucket.binary else 2 for bucket in buckets)  # values are copied out of the way first
    return 1 + len(buckets) * reduction + gathers


def _statistics_of_step(passes: Passes, num_micro_batches: int, world_size: int) -> int:
    """Of the mean of BatchNorm's running statistics over all replicas: sums, division, copy, and the counters of batches."""
    if not passes.num_counters:
        return 0
    counters = passes.num_counters if num_micro_batches > 1 else 0
    return (num_micro_batches - 1) + (world_size if world_size > 1 else 0) + 2 + counters


def _deepspeed(groups: Sequence[Group], sharding: str, world_size: int) -> tuple[int, int]:
    """(update, exchange) where DeepSpeed reduces the gradients: a rule per parameter, or per group of flat slices.

    Read roughly in DeepSpeed's source: stage 0 copies each gradient back out of the reduced bucket; the others copy each into a
    flat slice and take its norm.
    """
    num_tensors = sum(len(group["params"]) for group in groups)
    if sharding == "none":
        update = sum(len(group["params"]) * rule_launches(group) for group in groups)
        return update, num_tensors + 3 if world_size > 1 else 0
    update = 2 * num_tensors + sum(rule_launches(group) + 2 for group in groups)
    return update, 2 * len(groups) if world_size > 1 else 0
