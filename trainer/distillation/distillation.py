"""Distil a teacher into the network that a run trains."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bitfleet.trainer.distillation.cache import CachedLogits, LogitCache, Position, positions
from bitfleet.trainer.distillation.config import DistillConfig
from bitfleet.trainer.distillation.loss import distillation_loss
from bitfleet.trainer.distillation.teacher import Teacher


class Schedule(NamedTuple):
    """Sizes of a run that decide which rows of a cache a rank reads."""

    steps_per_epoch: int
    global_batch_size: int
    num_replicas: int
    rank: int
    world_size: int
    num_steps: int
    """After which this run ends."""

    def epochs_from(self, step: int) -> range:
        """Return the epochs that a run reads which continues after `step` steps."""
        if step >= self.num_steps:
            return range(0)
        return range(step // self.steps_per_epoch, self.last_epoch + 1)

    @property
    def last_epoch(self) -> int:
        """The epoch of the last step."""
        return (self.num_steps - 1) // self.steps_per_epoch


class Distillation:
    """Adds the teacher's logits to batches, and computes the loss; the same bits with and without a
    cache.

    Args:
        config: of the run, with a teacher.
        source: the teacher, or the cache of its logits.
        schedule: of the run.
        normalize: from images as the loader has them to a network's input.
        device: of the model.
        label_smoothing: `DataConfig.label_smoothing`.
    """

    def __init__(
        self,
        config: DistillConfig,
        source: Teacher | LogitCache,
        schedule: Schedule,
        *,
        normalize: Callable[[Tensor], Tensor],
        device: torch.device,
        label_smoothing: float = 0.0,
    ) -> None:
        self._label_smoothing = label_smoothing
        self._config, self._source, self._schedule, self._normalize = config, source, schedule, normalize
        self.weights_sha256 = source.weights_sha256
        """sha256 of the teacher's weights."""
        self._cached: CachedLogits | None = None
        self._positions: Iterator[Position] = iter(())
        if isinstance(source, LogitCache):
            self._cached = CachedLogits(
                source,
                device,
                last_epoch=schedule.last_epoch,
                rows_per_epoch=schedule.steps_per_epoch * schedule.global_batch_size,
            )

    def summary(self) -> str:
        """Return teacher, loss and source of the logits, in words."""
        config = self._config
        source = f"its logits from {config.cache}" if config.cache else "called in every step"
        labels = f", labels weigh {config.label_weight:g}" if config.label_weight else ""
        weights = f"weights sha256 {self.weights_sha256[:12]}"
        return f"teacher {config.teacher} ({weights}), {source}; temperature {config.temperature:g}{labels}"

    def check_can_continue(self, step: int) -> None:
        """Raise ValueError if the cache lacks an epoch that the run needs after `step` steps."""
        if isinstance(self._source, LogitCache):
            self._source.check_has(self._schedule.epochs_from(step))

    def start(self, step: int) -> None:
        """Continue with the batches after `step` steps."""
        schedule = self._schedule
        self._positions = positions(
            start_step=step,
            steps_per_epoch=schedule.steps_per_epoch,
            global_batch_size=schedule.global_batch_size,
            num_replicas=schedule.num_replicas,
            rank=schedule.rank,
            world_size=schedule.world_size,
        )

    def with_targets(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the next batch, images and labels, and the teacher's logits, fp16 [N, classes].

        Raises:
            ValueError: the cache is damaged.
        """
        images = batch[0]
        if self._cached is not None:
            return *batch, self._cached.at(next(self._positions))
        assert isinstance(self._source, Teacher)
        return *batch, self._source(self._normalize(images))

    def loss(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, and what is reported of it; see `distillation_loss`."""
        return distillation_loss(logits, labels, teacher_logits, self._config, self._label_smoothing)
