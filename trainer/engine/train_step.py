"""One optimizer step over a rank's micro-batches, through DeepSpeed's engine; the host waits for nothing in it."""

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.data.request import Batch
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.engine import backward
from bitfleet.trainer.metrics.readings import Readings


class TrainStep:
    """Makes optimizer steps.

    Args:
        config: the run.
        engine: DeepSpeed's.
        optimizer: that of the engine.
        statistics: of the network's BatchNorms.
        readings: meters of the run.
        num_micro_batches: of this rank, per step.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Any,
        optimizer: Optimizer,
        statistics: RunningStatistics,
        readings: Readings,
        num_micro_batches: int,
    ) -> None:
        self._config, self._engine, self._statistics, self._readings = config, engine, statistics, readings
        self._sharded = optimizer if isinstance(optimizer, ShardedOptimizer) else None
        self.num_micro_batches = num_micro_batches

    def run(self, batches: Iterator[Batch]) -> None:
        """Make one step of the next batches."""
        readings = self._readings
        readings.meter.keep()
        for _ in range(self.num_micro_batches):
            images, labels = self.next_batch(batches)
            self._statistics.start_replica()
            logits: Tensor = self._engine(normalize(images, self._config.data.mean, self._config.data.std))
            loss = nn.functional.cross_entropy(logits.float(), labels)
            backward(self._engine, self.scaled(loss), self._config.engine.sharding)
            readings.own_time.end()
            self._statistics.end_replica()
            readings.meter.add(loss, logits.detach(), labels)
            self._engine.step()
        updated = self._sharded.updated if self._sharded else True
        self._statistics.end_step(updated)
        readings.meter.end_step(updated)
        readings.own_time.end_step()

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next micro-batch; the time that it takes is the loader's."""
        start = time.perf_counter()
        self._readings.own_time.begin()
        images, labels = next(batches)
        self._readings.stopwatch.waited(time.perf_counter() - start)
        return images, labels

    def scaled(self, loss: Tensor) -> Tensor:
        """Return what backward starts from: under fp16 the loss times its scale."""
        scale = self._sharded.loss_scale if self._sharded else None
        return loss if scale is None else loss * scale.value
