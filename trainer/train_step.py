"""Make an optimizer step over the micro-batches of a rank, with DeepSpeed's engine or for a CUDA
graph."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.distillation import Distillation
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.engine import autocast, backward, scaled_loss
from bitfleet.trainer.engine.step_graph import Batch
from bitfleet.trainer.metrics import StepObserver


def label_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, None]:
    """Return the cross-entropy with the labels, and nothing else to report."""
    return nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing), None


class TrainStep:
    """Makes optimizer steps over a rank's micro-batches; the host waits for nothing in them.

    Args:
        engine: DeepSpeed's, around `model`.
        model: the network.
        optimizer: of the engine.
        statistics: running statistics of the network's BatchNorms.
        observer: meters of the run.
        normalize: from images as the loader has them to the network's input.
        precision: `EngineConfig.precision`, not "auto".
        num_micro_batches: of this rank, per step.
        label_smoothing: `DataConfig.label_smoothing`.
        distillation: None to train on the labels.
    """

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        optimizer: Optimizer,
        statistics: RunningStatistics,
        observer: StepObserver,
        *,
        normalize: Callable[[Tensor], Tensor],
        precision: str,
        num_micro_batches: int,
        label_smoothing: float = 0.0,
        distillation: Distillation | None = None,
    ) -> None:
        self._engine, self._model, self._optimizer = engine, model, optimizer
        self._statistics, self._observer, self._normalize = statistics, observer, normalize
        self._precision, self.num_micro_batches = precision, num_micro_batches
        self.next_batch, self.end_backward, self.end_step = (
            observer.next_batch,
            observer.end_backward,
            observer.end_step,
        )
        self._loss: Callable[..., tuple[Tensor, Tensor | None]]
        self._loss = functools.partial(label_loss, label_smoothing=label_smoothing)
        if distillation is not None:
            self._loss = distillation.loss
            self.next_batch = lambda batches: distillation.with_targets(observer.next_batch(batches))

    def run(self, batches: Iterator[Batch]) -> None:
        """Make one step of the next batches."""
        self._observer.meter.keep()
        for _ in range(self.num_micro_batches):
            images, labels, *targets = self.next_batch(batches)
            with self._statistics.replica():
                logits: Tensor = self._engine(self._normalize(images))
                loss, measured = self._loss(logits.float(), labels, *targets)
                backward(self._engine, loss, self._optimizer)
            self.end_backward()
            self._observer.meter.add(loss, logits.detach(), labels, measured)
            self._engine.step()
        self.settle(self._optimizer.updated if isinstance(self._optimizer, ShardedOptimizer) else True)
        self.end_step()

    def accumulate(self, micro_batches: Sequence[Batch]) -> None:
        """Run forward and backward of all micro-batches of a step, without DeepSpeed's engine (in a
        CUDA graph)."""
        assert isinstance(self._optimizer, ShardedOptimizer)
        self._observer.meter.keep()
        for images, labels, *targets in micro_batches:
            with self._statistics.replica():
                with autocast(images.device, self._precision):
                    logits: Tensor = self._model(self._normalize(images))
                loss, measured = self._loss(logits.float(), labels, *targets)
                torch.autograd.backward(scaled_loss(loss, self._optimizer))
            self._observer.meter.add(loss, logits.detach(), labels, measured)

    def settle(self, updated: bool | Tensor) -> None:
        """Set running statistics and meters to those after the step.

        Args:
            updated: whether the optimizer updated the network, known to the host or bool [] on the
                device.
        """
        self._statistics.end_step(updated)
        self._observer.meter.end_step(updated)
