"""Observe what steps cost and do: meters that every step feeds, read at a logging step with one
host sync."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitfleet.optim import RULES, ShardedOptimizer, is_binary
from bitfleet.optim.diagnostics import BitDiagnostics, FlipCounts
from bitfleet.trainer.engine.engine import whole_weights
from bitfleet.trainer.metrics.accuracy import NUM_IMAGES, Accuracy, AccuracyMeter
from bitfleet.trainer.metrics.stragglers import StragglerWatch
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_numbers

Batch = tuple[Tensor, ...]


class StepReport(NamedTuple):
    """Report of the steps since the last one; flips and diagnostics are those of the last step."""

    train: Accuracy
    further: dict[str, Any]
    """Further means, flip ratios and facts, for the line of `train`; only the skipped steps without
    images, or when the loss is not finite."""
    diagnostics: dict[str, Any]
    seconds: float
    data_seconds: float
    images_per_second: float
    """Images that a run had counted before it was interrupted are in `train`, not here."""


class StepObserver:
    """Meters of a run, on every rank. They read nothing from the device until `read`.

    Args:
        ranks: this process's place.
        device: where the model runs.
        flips: looks at single steps.
        counts_replaced: whether the loader replaces bad samples, whose number is reported.
        measures: names of further means that the meter is told.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        flips: "StepFlips",
        *,
        counts_replaced: bool,
        measures: Sequence[str] = (),
    ) -> None:
        self.meter, self.stopwatch, self._timer = AccuracyMeter(device, measures), Stopwatch(), ComputeTimer(device)
        self.flips, self._stragglers = flips, StragglerWatch(ranks.hosts)
        self._num_earlier_images = 0
        self._counts_replaced = counts_replaced

    def load(self, sums: Sequence[float]) -> None:
        """Continue from the meter's sums of a checkpoint, on rank 0."""
        self.meter.load(sums)
        self._num_earlier_images = int(sums[NUM_IMAGES])

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next micro-batch; the time that it takes is the loader's."""
        start = time.perf_counter()
        self._timer.begin()
        batch = next(batches)
        self.stopwatch.waited(time.perf_counter() - start)
        return batch

    def end_backward(self) -> None:
        """Stop the time of this rank's own work: ranks wait for each other in what follows."""
        self._timer.end()

    def end_step(self) -> None:
        """Count an optimizer step."""
        self._timer.end_step()

    def read(
        self, *, num_skipped_steps: Callable[[], int], num_replaced: int, log: Callable[[str], None]
    ) -> StepReport:
        """Read all meters, with one host sync; every rank calls this after a step before which it
        called `flips.before_step`.

        Args:
            num_skipped_steps: returns the skipped steps of the run so far; called after the sync.
            num_replaced: samples that this rank's loader replaced so far.
            log: is told that a rank is slow.
        """
        train, means, counts = self.meter.read_with(self.flips.take())
        # From here on nothing waits for the device: it is where the host is.
        own_seconds = all_gather_numbers(self._timer.read())
        seconds, data_seconds = self.stopwatch.read()
        speed, self._num_earlier_images = (train.num_images - self._num_earlier_images) / seconds, 0
        facts: dict[str, Any] = {"skipped_steps": num_skipped_steps()}
        if train.num_images == 0 or not math.isfinite(train.loss):
            return StepReport(train, facts, {}, seconds, data_seconds, speed)
        flips = self.flips.report(counts)
        if self._counts_replaced:
            facts["replaced_samples"] = int(sum(all_gather_numbers(num_replaced)))
        facts |= self._stragglers.facts(own_seconds, log)
        return StepReport(train, means | flips.ratios | facts, flips.diagnostics, seconds, data_seconds, speed)


class Stopwatch:
    """Measure the seconds between readings, and how many of them were spent on waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.data_seconds = 0.0

    def waited(self, seconds: float) -> None:
        """Add time spent in the loader."""
        self.data_seconds += seconds

    def leave_out(self, seconds: float) -> None:
        """Leave `seconds` of the time that has passed out: they were not training."""
        self._start += seconds

    def read(self) -> tuple[float, float]:
        """Return (seconds, of which waiting for data) since the last reading."""
        now = time.perf_counter()
        result = now - self._start, self.data_seconds
        self._start, self.data_seconds = now, 0.0
        return result


class ComputeTimer:
    """Measure the seconds that this rank needs for loading, forward and backward; after them ranks
    wait for each other.

    On a GPU the clock is that of its stream. With engine.sharding none and zero1 to zero3 DeepSpeed
    reduces inside of backward, so the waiting is in it and the ranks look alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._started = 0.0
        self._is_running = False
        self._num_steps = 0

    def begin(self) -> None:
        """Start to time a micro-batch, or the step of a CUDA graph, which loads all of them
        first."""
        if self._is_running:
            return
        self._is_running = True
        if self._on_gpu:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        self._started = time.perf_counter()

    def end(self) -> None:
        """Stop after its backward."""
        self._is_running = False
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def end_step(self) -> None:
        """Count an optimizer step."""
        self._num_steps += 1

    def read(self) -> float:
        """Return the seconds per step since the last reading; on a GPU this waits for it."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        result = self._seconds / max(self._num_steps, 1)
        self._events, self._seconds, self._num_steps = [], 0.0, 0
        return result


class FlipReport(NamedTuple):
    """Flips of one step; the same on every rank."""

    ratios: dict[str, float]
    """ "flip_ratio" overall, "flip_ratio/<parameter>" each; empty without binary weights."""
    diagnostics: dict[str, Any]
    """See `BitDiagnostics.values`; empty without them."""


class StepFlips(Protocol):
    """Counts the flips of single steps; every rank calls all three methods, in this order."""

    def before_step(self) -> None:
        """Prepare to observe the coming step."""

    def take(self) -> Tensor:
        """Return the counts of this rank after the step, int64 [n], on the device."""

    def report(self, counts: Sequence[int]) -> FlipReport:
        """Return the flips of the step from the summed counts of all ranks."""


class WholeFlips:
    """Flips under an optimizer that is not sharded by bitfleet: rank 0 compares its weights."""

    def __init__(self, engine: Any, model: nn.Module, ranks: Ranks) -> None:
        self._engine, self._ranks, self._counter = engine, ranks, FlipCounter(model)

    def before_step(self) -> None:
        """Copy the weights."""
        with whole_weights(self._engine):
            if self._ranks.is_main:
                self._counter.before_step()

    def take(self) -> Tensor:
        """Compare them, on rank 0."""
        with whole_weights(self._engine):
            return self._counter.take()

    def report(self, counts: Sequence[int]) -> FlipReport:
        """Return ratios only."""
        return FlipReport(self._counter.flip_ratios(counts), {})


class SlicedFlips:
    """Flips under a sharded optimizer, which is observed in these steps only."""

    def __init__(self, sharded: ShardedOptimizer) -> None:
        self._sharded, self._counts = sharded, FlipCounts(sharded)

    def before_step(self) -> None:
        """Start to observe."""
        self._sharded.observers.append(self._counts.observe)

    def take(self) -> Tensor:
        """Stop."""
        self._sharded.observers.remove(self._counts.observe)
        return self._counts.take()

    def report(self, counts: Sequence[int]) -> FlipReport:
        """Return ratios only."""
        return FlipReport(self._counts.flip_ratios(counts), {})


class DiagnosedFlips:
    """Flips from the diagnostics of bits, which see every step."""

    def __init__(self, diagnostics: BitDiagnostics) -> None:
        self._diagnostics = diagnostics

    def before_step(self) -> None:
        """Count also what needs the moments."""
        self._diagnostics.wanted = True

    def take(self) -> Tensor:
        """Return the counts of this rank's slices."""
        return self._diagnostics.take()

    def report(self, counts: Sequence[int]) -> FlipReport:
        """Return ratios and diagnostics."""
        return FlipReport(self._diagnostics.flip_ratios(counts), self._diagnostics.values(counts))


def step_flips(
    engine: Any, model: nn.Module, optimizer: Optimizer, ranks: Ranks, diagnostics: BitDiagnostics | None
) -> StepFlips:
    """Return the cheapest way to count the flips of a step."""
    if diagnostics is not None:
        return DiagnosedFlips(diagnostics)
    if isinstance(optimizer, ShardedOptimizer):
        return SlicedFlips(optimizer)
    return WholeFlips(engine, model, ranks)


class FlipCounter:
    """Compares the signs of binary weights before and after a step (larq's flip_ratio), overall and
    per parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._params = [(name, param) for name, param in model.named_parameters() if is_binary(param)]
        self._before: list[Tensor] = []
        self._sizes: list[int] = []

    def before_step(self) -> None:
        """Remember the weights."""
        self._before = [param.detach().clone() for _, param in self._params]

    def take(self) -> Tensor:
        """Count the weights of each parameter whose sign has changed since `before_step`, int64
        [parameters]; 0 without that call."""
        before, self._before = self._before, []
        self._sizes = [
            param.numel() for _, param in self._params
        ]  # here: under zero3 a parameter is empty at other times
        if not before:
            return torch.zeros(len(self._params), dtype=torch.int64)
        pairs = zip(before, self._params, strict=True)
        return torch.stack([((old >= 0) != (param.detach() >= 0)).sum() for old, (_, param) in pairs])

    def flip_ratios(self, counts: Sequence[int]) -> dict[str, float]:
        """Return the ratios of counts of `take`: "flip_ratio" overall, "flip_ratio/<parameter>"
        each; empty without binary weights."""
        if not self._params:
            return {}
        layers = {
            f"flip_ratio/{name}": count / size
            for (name, _), count, size in zip(self._params, counts, self._sizes, strict=True)
        }
        return {"flip_ratio": sum(counts) / sum(self._sizes), **layers}


def hyperparameters_of(optimizer: Optimizer) -> dict[str, float]:
    """Return the values that schedules change from step to step, for the metrics."""
    return {key: group[key] for group in optimizer.param_groups for key in RULES[group["rule"]].scheduled}
