"""Say what a run sends per step, and measure its memory and time in its first steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from bitfleet.launch.plan.traffic import describe, traffic
from bitfleet.launch.preflight.tensor_bytes import TensorBytes
from bitfleet.launch.text import clock, megabytes
from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.trainer import Trainer

UNTIMED_STEPS, TIMED_STEPS = 5, 15
"""The first steps fill caches and the loader's queue; the expected time comes from those after
them."""


class Preflight:
    """Counts the bytes that a run sends, and reports memory and time of its first steps.

    Args:
        trainer: the run, before its first step; rank 0 is measured.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        config, world_size = trainer.config, trainer.ranks.world_size
        self.sent_bytes: float | None = None
        """Bytes that each rank sends per step; None if unknown (zero3, where it depends on what
        DeepSpeed keeps gathered)."""
        if config.engine.sharding != "zero3":
            with torch.random.fork_rng(devices=[]):
                network = describe(config)
            messages = traffic(network, config, world_size)
            self.sent_bytes = messages.sent_bytes(world_size)
            if config.engine.sharding == "zero2":  # reduces the gradients of every micro-batch, the plan counts one
                reduced = sum(message.sent_bytes(world_size) for message in messages.gradients)
                self.sent_bytes += (trainer.num_replicas // world_size - 1) * reduced
        self._num_done, self._seconds = 0, 0.0
        # ShardedOptimizer has its state from the start, the others make it in the first update.
        self._measured_step = 1 if isinstance(trainer.sharded, ShardedOptimizer) else 2
        if trainer.compiled and trainer.device.type == "cpu":
            self._measured_step = 0  # never: counting tensors would run that step eagerly, with other bits

    def report(self) -> str:
        """Return what is known before the first step, in lines."""
        sharding = self._trainer.config.engine.sharding
        about = "" if sharding == "bits" else "about "
        known = "nothing is sent, there is one rank"
        if self.sent_bytes is None:
            known = f"not known for engine.sharding {sharding}"
        elif self.sent_bytes:
            known = f"each rank sends {about}{megabytes(self.sent_bytes)} per step"
        return f"traffic: {known}\nexpected time: unknown until {UNTIMED_STEPS + TIMED_STEPS} steps are done"

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Measure the step inside, if it is one of the first, and report on rank 0."""
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
        trainer, device = self._trainer, self._trainer.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            yield
            peak, kind = torch.cuda.max_memory_allocated(device), "allocated on the GPU"
        else:
            with TensorBytes() as count:
                if isinstance(trainer.sharded, ShardedOptimizer):
                    for chunk in trainer.sharded.chunks():
                        chunk.tensor.detach()  # seen from the start: the update comes after the peak
                yield
            peak, kind = count.peak, "of tensors"
        image_bytes = trainer.loader.device_bytes + trainer.validation_loader.device_bytes
        images = f", decoded images {megabytes(image_bytes)} of it" if image_bytes else ""
        trainer.reports.say(
            f"memory of rank {trainer.ranks.rank}, measured in step {self._measured_step}: {megabytes(peak)} {kind} at "
            f"the peak{images}; the process has {megabytes(psutil.Process().memory_info().rss)}"
        )

    def _expected_time(self) -> str:
        trainer = self._trainer
        step_seconds = self._seconds / TIMED_STEPS
        rate = trainer.config.global_batch_size / step_seconds
        last = min(trainer.num_steps, trainer.config.stop_after_steps or trainer.num_steps)
        return (
            f"expected time: {clock((last - trainer.step) * step_seconds)} until step {last:,} "
            f"({1000 * step_seconds:,.0f} ms per step, {rate:,.0f} images/s), validation and checkpoints not included"
        )
