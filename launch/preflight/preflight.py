"""What a run will cost, said before it begins; measured during its first steps and compared."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch

from bitfleet.launch.preflight.memory import BucketShape, Memory, bucket_shapes, predict_memory
from bitfleet.launch.preflight.tensor_bytes import TensorBytes
from bitfleet.launch.text import clock, megabytes
from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.engine.config import EngineConfig
from bitfleet.trainer.trainer import Trainer

UNTIMED_STEPS, TIMED_STEPS = 5, 15
"""The first steps fill caches and the loader's queue; the expected time comes from those after them."""


def sent_bytes(
    buckets: Sequence[BucketShape], engine: EngineConfig, *, world_size: int, num_replicas: int, num_statistics: int
) -> float | None:
    """What a rank sends in an ordinary step (no logging, saving or `check_every_steps`), by the formulas of docs/sharding.md.

    Each collective counts as the bytes that the best algorithm for it has to send, as `bitfleet bench comm` counts. None for
    zero3, where that depends on what DeepSpeed keeps gathered.

    Args:
        buckets: of the optimizer.
        engine: how it is sharded.
        world_size: N, number of ranks.
        num_replicas: micro-batches of a step over all ranks.
        num_statistics: elements of BatchNorm's running statistics, fp32.
    """
    if world_size == 1:
        return 0.0
    share = (world_size - 1) / world_size
    statistics = world_size * 4 * num_statistics if num_replicas > 1 else 0
    stop = 2 * 24  # an all-reduce of three int64; after quick steps not after each
    numel = sum(bucket.numel for bucket in buckets)
    if engine.sharding == "zero3":
        return None
    if engine.sharding != "bits":
        # Gradients are all-reduced, which counts twice, under zero2 for each micro-batch; ZeRO gathers the weights at full width.
        reductions = num_replicas // world_size if engine.sharding == "zero2" else 1
        return share * ((8 * reductions + (4 if engine.stage else 0)) * numel + statistics + stop)
    width = 2 if engine.grad_comm_dtype == "bf16" else 4
    weights = sum(bucket.numel / 8 if bucket.binary else 4 * bucket.numel for bucket in buckets)
    agreement = 2 * 4 * (2 + sum(len(bucket.names) for bucket in buckets))
    return share * (width * numel + weights + agreement + statistics + stop)


class Preflight:
    """Predicts memory, traffic and time of a run, and compares the prediction with its first steps.

    Args:
        trainer: the run, before its first step; rank 0's is predicted and measured.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        config, world_size = trainer.config, trainer.ranks.world_size
        buckets = bucket_shapes(trainer.sharded, trainer.checkpoints.state.signature)
        self.memory: Memory = predict_memory(config, buckets, world_size=world_size, num_replicas=trainer.num_replicas)
        """Bytes of a rank."""
        self.image_bytes: int = trainer.loader.device_bytes + trainer.validation_loader.device_bytes
        """Bytes of decoded images on this rank's GPU (data.loader "memory")."""
        self.sent_bytes: float | None = sent_bytes(
            buckets,
            config.engine,
            world_size=world_size,
            num_replicas=trainer.num_replicas,
            num_statistics=trainer.statistics.numel,
        )
        """Bytes that a rank sends per step; None where that is not predicted."""
        self._num_done, self._seconds = 0, 0.0
        # ShardedOptimizer has its state from the start, the others make it in the first update.
        self._measured_step = 1 if isinstance(trainer.sharded, ShardedOptimizer) else 2
        if trainer.compiled and trainer.device.type == "cpu":
            self._measured_step = 0  # never: counting tensors would run that step eagerly, with other bits

    def report(self) -> str:
        """What is known before the first step, in lines."""
        memory, trainer = self.memory, self._trainer
        batch = trainer.config.global_batch_size // trainer.num_replicas
        about = "" if isinstance(trainer.sharded, ShardedOptimizer) else "about "
        images = f", decoded images {megabytes(self.image_bytes)}" if self.image_bytes else ""
        traffic = "nothing is sent, there is one rank"
        if self.sent_bytes is None:
            traffic = f"not predicted for engine.sharding {trainer.config.engine.sharding}"
        elif self.sent_bytes:
            traffic = f"a rank sends {about}{megabytes(self.sent_bytes)} a step"
        return (
            f"memory of a rank, predicted: weights {megabytes(memory.weights)}, optimizer state {megabytes(memory.state)}, "
            f"gradients {about}{megabytes(memory.gradients)}, activations {megabytes(memory.activations)} "
            f"(micro-batch of {batch}){images}; at most {about}{megabytes(memory.peak + self.image_bytes)} at a time\n"
            f"traffic: {traffic}\n"
            f"expected time: unknown until {UNTIMED_STEPS + TIMED_STEPS} steps are done"
        )

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """To be entered around each step of the trainer: measures the first ones and reports, on rank 0."""
        if self._num_done == self._measured_step - 1:
            with self._measured_memory():
                yield
        else:
            start = time.perf_counter()
            yield
            if self._num_done >= UNTIMED_STEPS:
                self._seconds += time.perf_counter() - start
        self._num_done += 1
        if self._num_done == UNTIMED_STEPS + TIMED_STEPS:
            self._trainer.reports.say(self._expected_time())

    @contextmanager
    def _measured_memory(self) -> Iterator[None]:
        device = self._trainer.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            yield
            peak, what = torch.cuda.max_memory_allocated(device), "allocated on the GPU"
        else:
            with TensorBytes() as count:
                if isinstance(self._trainer.sharded, ShardedOptimizer):
                    for chunk in self._trainer.sharded.chunks():
                        chunk.tensor.detach()  # seen from the start: the update comes after the peak
                yield
            peak, what = count.peak, "of tensors"
        predicted = self.memory.peak + self.image_bytes
        self._trainer.reports.say(
            f"memory of rank {self._trainer.ranks.rank}, measured in step {self._measured_step}: {megabytes(peak)} {what} at the "
            f"peak, predicted were {megabytes(predicted)} (measured / predicted {peak / predicted:.3f}); the process has "
            f"{megabytes(psutil.Process().memory_info().rss)}"
        )

    def _expected_time(self) -> str:
        trainer = self._trainer
        each = self._seconds / TIMED_STEPS
        last = min(trainer.num_steps, trainer.config.stop_after_steps or trainer.num_steps)
        rate = trainer.config.global_batch_size / each
        return (
            f"expected time: {clock((last - trainer.step) * each)} until step {last:,} ({1000 * each:,.0f} ms a step, "
            f"{rate:,.0f} images/s), validation and checkpoints not included"
        )
