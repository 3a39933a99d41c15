"""What is read at a logging step: the means since the last one, and how long everything took."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.metrics.flips import StepFlips
from bitfleet.trainer.metrics.metrics import Accuracy, AccuracyMeter, Stopwatch
from bitfleet.trainer.metrics.stragglers import OwnTime, StragglerWatch
from bitfleet.trainer.ranks.collectives import Ranks, numbers_from_ranks


class Reading(NamedTuple):
    """Of the steps since the last one; flips and diagnostics of the last step."""

    train: Accuracy
    further: dict[str, Any]
    """Flip ratios and facts, for the line of `train`; only the skipped steps without images, or when the loss is not finite."""
    diagnostics: dict[str, Any]
    seconds: float
    data_seconds: float
    images_per_second: float
    """Of the images of `train` that belong to `seconds`: not those that a run had counted before it was interrupted."""


class Readings:
    """The meters of a run, on every rank."""

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device, flips: StepFlips) -> None:
        self.meter, self.stopwatch, self.own_time = AccuracyMeter(device), Stopwatch(), OwnTime(device)
        self.flips, self._stragglers = flips, StragglerWatch(ranks.hosts)
        self._num_earlier_images = 0
        self._counts_replaced = config.data.on_bad_sample == "replace"

    def load(self, sums: Sequence[float]) -> None:
        """Continue from the meter's sums of a checkpoint, on rank 0."""
        self.meter.load(sums)
        self._num_earlier_images = int(sums[-1])

    def read(self, *, num_skipped_steps: Callable[[], int], num_replaced: int, say: Callable[[str], None]) -> Reading:
        """Read all of them, with one host sync; every rank calls this after a step before which it called `flips.before_step`.

        Args:
            num_skipped_steps: of the run so far; called after the sync.
            num_replaced: samples that this rank's loader replaced so far.
            say: is told that a rank is slow.
        """
        train, counts = self.meter.read_with(self.flips.take())
        # From here on nothing waits for the device: it is where the host is.
        own_seconds = numbers_from_ranks(self.own_time.read())
        seconds, data_seconds = self.stopwatch.read()
        speed, self._num_earlier_images = (train.num_images - self._num_earlier_images) / seconds, 0
        facts: dict[str, Any] = {"skipped_steps": num_skipped_steps()}
        if train.num_images == 0 or not math.isfinite(train.loss):
            return Reading(train, facts, {}, seconds, data_seconds, speed)
        flips = self.flips.report(counts)
        if self._counts_replaced:
            facts["replaced_samples"] = int(sum(numbers_from_ranks(num_replaced)))
        facts |= self._stragglers.facts(own_seconds, say)
        return Reading(train, flips.ratios | facts, flips.diagnostics, seconds, data_seconds, speed)
