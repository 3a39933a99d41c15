"""How much memory a rank will need: an optimizer step is rehearsed on tensors with a size but no memory (the meta device).

The rehearsal runs the network's own forward and backward and keeps the books of `ShardedOptimizer` beside them: which buffers of
its buckets are alive when. It knows nothing of scratch memory inside an operator (cuDNN's workspaces) nor of DALI.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.launch.preflight.tensor_bytes import TensorBytes
from bitfleet.models import create_model
from bitfleet.models.layers.binary_conv import meta_is_cpu
from bitfleet.optim import RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.diagnostics import BITS_PER_WEIGHT
from bitfleet.optim.rules.rule import RULES
from bitfleet.optim.sharding.reduction import MAX_FLIGHTS, can_halve
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.engine.config import EngineConfig

ADAM_TEMPORARIES = 3
"""Tensors of a slice's size that the eager rule of the full-precision parameters holds at a time."""


class BucketShape(NamedTuple):
    """As much of a bucket as its memory and traffic depend on."""

    names: tuple[str, ...]
    """Its parameters."""
    numel: int
    """Elements of all slices, padding included."""
    binary: bool
    """Its weights travel as bits."""
    num_moments: int
    """fp32 tensors of state."""


class Memory(NamedTuple):
    """Bytes of a rank."""

    weights: int
    """Parameters and buffers."""
    state: int
    """This rank's share of the optimizer state."""
    gradients: int
    """The most that gradients on their way hold at a time."""
    activations: int
    """The most that forward and backward of a micro-batch hold at a time, its images and what is saved for backward included."""
    peak: int
    """The most that all of it together holds at a time; less than the sum, because activations go while gradients come."""


def bucket_shapes(
    optimizer: RoutedOptimizer | ShardedOptimizer, signature: Mapping[str, Sequence[int]]
) -> list[BucketShape]:
    """The buckets of a sharded optimizer; for a plain one each group is a bucket.

    Args:
        optimizer: the run's.
        signature: name -> shape of every parameter, from before DeepSpeed had them: ZeRO puts its own into the optimizer.
    """
    if isinstance(optimizer, ShardedOptimizer):
        return [
            BucketShape(
                tuple(segment.name for segment in bucket.segments),
                bucket.weights.numel(),
                bucket.binary,
                len(bucket.state),
            )
            for bucket in optimizer.buckets
        ]
    return [
        BucketShape(
            tuple(group["param_names"]),
            sum(math.prod(signature[name]) for name in group["param_names"]),
            False,
            len(RULES[group["rule"]].state_keys),
        )
        for group in optimizer.param_groups
    ]


def predict_memory(
    config: TrainConfig, buckets: Sequence[BucketShape], *, world_size: int, num_replicas: int
) -> Memory:
    """What one rank holds in a step.

    Args:
        config: the run.
        buckets: of its optimizer.
        world_size: number of ranks.
        num_replicas: micro-batches of a step over all ranks.
    """
    with torch.random.fork_rng(devices=[]):
        model = create_model(config.model).to("meta")
    trained = {name for bucket in buckets for name in bucket.names}
    frozen = sum(param.nbytes for name, param in model.named_parameters() if name not in trained)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    numel = sum(bucket.numel for bucket in buckets)
    state = sum(_state_bytes(bucket, config.engine, world_size) for bucket in buckets)
    if config.metrics.diagnostics:
        state += sum(BITS_PER_WEIGHT * bucket.numel // 8 // world_size for bucket in buckets if bucket.binary)
    weights = 4 * numel // (world_size if config.engine.sharding == "zero3" else 1) + frozen + buffers
    local_replicas = num_replicas // world_size
    batch = config.global_batch_size // num_replicas
    # The statistics at the begin of the step, those of each replica, and one more while they are averaged.
    held = weights + state + buffers * (local_replicas + 2 if num_replicas > 1 else 1)
    activations = _rehearse(model, config, batch, _GradientFlow([], config.engine, world_size, local_replicas))
    if config.engine.sharding != "bits":
        gradients = _deepspeed_gradients(numel, config.engine, world_size)
        return Memory(weights, state, gradients, activations, held + gradients + activations)
    flow = _GradientFlow(buckets, config.engine, world_size, local_replicas)
    peak = _rehearse(model, config, batch, flow)
    return Memory(weights, state, flow.peak, activations, held + max(peak, _in_step(buckets, world_size)))


def _state_bytes(bucket: BucketShape, engine: EngineConfig, world_size: int) -> int:
    """Moments, and what else stands for the weights of this rank's slice: packed signs, or ZeRO's fp32 copy."""
    share = bucket.numel if engine.sharding == "none" else bucket.numel // world_size
    copies = 4 * share if engine.stage > 0 else share // 8 if bucket.binary else 0
    return 4 * bucket.num_moments * share + copies


def _deepspeed_gradients(numel: int, engine: EngineConfig, world_size: int) -> int:
    """Every gradient until the step; ZeRO flattens them into a bucket, of which it keeps a rank's part."""
    return 4 * numel if engine.stage == 0 else 4 * numel + 4 * numel // world_size


def _in_step(buckets: Sequence[BucketShape], world_size: int) -> int:
    """The most that the update itself holds: reduced gradients, temporaries, and what is gathered."""
    slices = sum(4 * bucket.numel // world_size for bucket in buckets)
    temporaries = max((4 * bucket.numel // world_size for bucket in buckets if not bucket.binary), default=0)
    gathered = sum(bucket.numel // 8 if bucket.binary else 4 * bucket.numel // world_size for bucket in buckets)
    return slices + ADAM_TEMPORARIES * temporaries + (gathered if world_size > 1 else 0)


def _rehearse(model: nn.Module, config: TrainConfig, batch: int, flow: "_GradientFlow") -> int:
    """Peak of forward and backward over a micro-batch of `batch` images, without the model's own bytes.

    Args:
        model: on the meta device.
        config: the run.
        batch: images.
        flow: where gradients go; those of parameters that it does not know are freed.
    """

    def on_gradient(name: str) -> Callable[[Tensor], None]:
        def take(param: Tensor) -> None:
            flow.arrive(name)
            param.grad = None

        return take

    size = config.data.image_size
    dtype = torch.float32 if config.data.preprocessing == "official" else torch.uint8
    hooks = [
        param.register_post_accumulate_grad_hook(on_gradient(name))
        for name, param in model.named_parameters()
        if param.requires_grad
    ]
    model.train()
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    with TensorBytes(meta=True) as count, meta_is_cpu(on_cpu):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach()  # seen
        base: int = count.live
        count.take_peak()
        flow.begin()
        raw = torch.empty((batch, size, size, 3), dtype=dtype, device="meta")
        labels = torch.empty(batch, dtype=torch.int64, device="meta")
        logits: Tensor = model(normalize(raw, config.data.mean, config.data.std))
        loss = nn.functional.cross_entropy(logits.float(), labels)
        torch.autograd.backward(loss)
        flow.end()
        peak: int = count.take_peak()
    for hook in hooks:
        hook.remove()
    return peak - base


class _GradientFlow:
    """The buffers of `sharding_reduction.Reduction` over the last of a rank's micro-batches, as tensors without memory.

    Landings are as late as they can be: on a fast network fewer buffers are alive.
    """

    def __init__(
        self, buckets: Sequence[BucketShape], engine: EngineConfig, world_size: int, local_replicas: int
    ) -> None:
        self._buckets, self._world_size = buckets, world_size
        self._dtype = torch.bfloat16 if engine.grad_comm_dtype == "bf16" else torch.float32
        # Partial sums are a binary counter: so many at most beside the replica that arrives.
        self._num_partials = max(number.bit_count() for number in range(local_replicas))
        self._local: list[list[Tensor]] = [[] for _ in buckets]
        self._bucket_of = {name: index for index, bucket in enumerate(buckets) for name in bucket.names}
        self._missing = [set(bucket.names) for bucket in buckets]
        self._arriving = [False] * len(buckets)
        self._flights: list[tuple[Tensor, Tensor]] = []
        self._reduced: list[Tensor] = []
        self._next = 0
        self.peak = 0

    def begin(self) -> None:
        """The earlier micro-batches have left their partial sums."""
        for held, bucket in zip(self._local, self._buckets, strict=True):
            held += [_empty(bucket.numel) for _ in range(self._num_partials)]
        self._note()

    def arrive(self, name: str) -> None:
        """The gradient of parameter `name` goes into its bucket."""
        if name not in self._bucket_of:
            return
        index = self._bucket_of[name]
        if not self._arriving[index]:
            self._arriving[index] = True
            self._local[index].append(_empty(self._buckets[index].numel))
        self._missing[index].discard(name)
        self._note()
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._send()

    def end(self) -> None:
        """Backward is over: what is left is sent and lands."""
        while self._next < len(self._buckets):
            self._send()
        while self._flights:
            self._land()

    def _send(self) -> None:
        index, self._next = self._next, self._next + 1
        while len(self._flights) >= MAX_FLIGHTS:
            self._land()
        self._local[index] = []  # summed into one, in place
        total = _empty(self._buckets[index].numel)
        if self._world_size == 1:
            self._reduced.append(total)
            return
        send = total if can_halve(self._world_size) else total.to(self._dtype)
        self._flights.append((send, torch.empty_like(total, dtype=self._dtype)))
        del total
        self._note()

    def _land(self) -> None:
        send, _ = self._flights.pop(0)
        self._reduced.append(_empty(send.numel() // self._world_size))
        self._note()

    def _note(self) -> None:
        self.peak = max(self.peak, sum(tensor.nbytes for tensor in self._tensors()))

    def _tensors(self) -> Iterator[Tensor]:
        for held in self._local:
            yield from held
        for send, received in self._flights:
            yield from (send, received)
        yield from self._reduced


def _empty(numel: int) -> Tensor:
    return torch.empty(numel, device="meta")
