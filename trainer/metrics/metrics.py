"""What a run reports: counts on the device, one host sync a logging step, TensorBoard and metrics.jsonl on rank 0."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitfleet.optim import RULES, is_binary
from bitfleet.trainer.metrics.diagnostics import show_diagnostics
from bitfleet.trainer.ranks.collectives import sum_over_ranks_
from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.strict_json import finite_or_null, to_json

JSONL = "metrics.jsonl"
TENSORBOARD = "tensorboard"
EVENT_PREFIX = "events.out.tfevents."
LOSS_GRID = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """How often a run reports."""

    every_steps: int = 10
    """Log every so many optimizer steps; on all other steps metrics cost no host sync."""
    diagnostics: bool = False
    """Log also what the flips of the binary weights amount to (docs/diagnostics.md); wants engine.sharding bits."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"metrics.every_steps must be at least 1, not {self.every_steps}")


class Accuracy(NamedTuple):
    """Means over `num_images` images; the top-k are fractions."""

    loss: float
    top1: float
    top5: float
    num_images: int


class AccuracyMeter:
    """Sums of loss and hits on the device; reading them is the only sync.

    Losses are added as multiples of 2^-30 in float64: sums below 2^23 are exact, so they do not depend on their order, on the
    number of ranks, or on an interruption.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._kept = self._sums.clone()

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: loss (its mean over the batch, 0-dim, or that of each image [N]), logits [N, classes], labels [N]."""
        num_images = labels.numel()
        if num_images == 0:
            return
        losses = (loss.detach().double() * (num_images if loss.dim() == 0 else 1)).mul(LOSS_GRID).round().div(LOSS_GRID)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        hits = top.double().sum(0)
        self._sums[0] += losses.sum()
        self._sums[1] += hits[0]
        self._sums[2] += hits.sum()
        self._sums[3] += num_images

    def keep(self) -> None:
        """Remember the sums, for `end_step`."""
        self._kept.copy_(self._sums)

    def end_step(self, updated: bool | Tensor) -> None:
        """Drop what was added since `keep` if the step was skipped.

        Args:
            updated: whether the step was not: known to the host, or bool [] on the device.
        """
        if isinstance(updated, Tensor):
            self._sums.copy_(torch.where(updated, self._sums, self._kept))
        elif not updated:
            self._sums.copy_(self._kept)

    def peek(self) -> list[float]:
        """The sums over all ranks since the last reading, for a checkpoint; every rank calls this."""
        sums: list[float] = sum_over_ranks_(self._sums.clone()).tolist()
        return sums

    def load(self, sums: Sequence[float]) -> None:
        """Continue from `peek`; on one rank only, the others start at 0."""
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def read(self) -> Accuracy:
        """Means over everything counted on all ranks since the last reading; every rank calls this."""
        return self.read_with(self._sums[:0])[0]

    def read_with(self, counts: Tensor) -> tuple[Accuracy, list[int]]:
        """Read, and in the same collective and host sync the sums over the ranks of `counts`, int64 [n], each below 2^53."""
        sums = torch.cat([self._sums, counts.to(self._sums)])
        loss, top1, top5, num_images, *sums_of_counts = sum_over_ranks_(sums).tolist()
        self._sums.zero_()
        count = max(num_images, 1.0)
        accuracy = Accuracy(loss / count, top1 / count, top5 / count, int(num_images))
        return accuracy, [int(each) for each in sums_of_counts]


class FlipCounter:
    """Fraction of the binary weights whose sign one optimizer step changed (larq's flip_ratio), overall and per parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._params = [(name, param) for name, param in model.named_parameters() if is_binary(param)]
        self._before: list[Tensor] = []
        self._sizes: list[int] = []

    def before_step(self) -> None:
        """Remember the weights."""
        self._before = [param.detach().clone() for _, param in self._params]

    def take(self) -> Tensor:
        """The weights of each parameter whose sign has changed since `before_step`, int64 [parameters]; 0 without that call."""
        before, self._before = self._before, []
        self._sizes = [
            param.numel() for _, param in self._params
        ]  # here: under zero3 a parameter is empty at other times
        if not before:
            return torch.zeros(len(self._params), dtype=torch.int64)
        pairs = zip(before, self._params, strict=True)
        return torch.stack([((old >= 0) != (param.detach() >= 0)).sum() for old, (_, param) in pairs])

    def flip_ratios(self, counts: Sequence[int]) -> dict[str, float]:
        """Of counts that `take` returned: "flip_ratio" overall, "flip_ratio/<parameter>" each; empty without binary weights."""
        if not self._params:
            return {}
        layers = {
            f"flip_ratio/{name}": count / size
            for (name, _), count, size in zip(self._params, counts, self._sizes, strict=True)
        }
        return {"flip_ratio": sum(counts) / sum(self._sizes), **layers}


class Stopwatch:
    """Seconds between readings, and how many of them went into waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.data_seconds = 0.0

    def waited(self, seconds: float) -> None:
        """Add time spent in the loader."""
        self.data_seconds += seconds

    def leave_out(self, seconds: float) -> None:
        """Do not count `seconds` of what has passed: they were not training."""
        self._start += seconds

    def read(self) -> tuple[float, float]:
        """(seconds, of which waiting for data) since the last reading."""
        now = time.perf_counter()
        result = now - self._start, self.data_seconds
        self._start, self.data_seconds = now, 0.0
        return result


class MetricsWriter:
    """Appends to metrics.jsonl and TensorBoard; only rank 0 has one.

    Args:
        run: run folder.
        start_step: what an earlier, interrupted part of the run logged after this step is dropped from both.
    """

    def __init__(self, run: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / JSONL
        kept = [line for line in read_metrics(run) if line["step"] <= start_step]
        write_atomically(path, "".join(to_json(line) + "\n" for line in kept))
        self._file = path.open("a")
        order_event_files(run / TENSORBOARD, time.time())
        self._tensorboard = SummaryWriter(str(run / TENSORBOARD), purge_step=start_step + 1)
        self._has_layout = False

    def write(self, kind: str, step: int, values: Mapping[str, float | str | None]) -> None:
        """Log `values` of `kind` ("train" or "validation") after `step` optimizer steps; TensorBoard gets the numbers.

        None, and what is not finite, is null in metrics.jsonl.
        """
        self._append(kind, step, values)
        for key, value in values.items():
            if value is not None and not isinstance(value, str):
                self._tensorboard.add_scalar(f"{kind}/{key}", value, step)

    def write_diagnostics(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the diagnostics of bits (`BitDiagnostics.values`) after `step` optimizer steps."""
        self._append("diagnostics", step, values)
        show_diagnostics(self._tensorboard, step, values, with_layout=not self._has_layout)
        self._has_layout = True

    def _append(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(to_json({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def write_text(self, tag: str, text: str) -> None:
        """Show a text in TensorBoard, line by line."""
        self._tensorboard.add_text(tag, "".join(f"    {line}\n" for line in text.splitlines()))

    def flush(self) -> None:
        """Bring everything to the disk: a checkpoint of this step must not outlive its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._tensorboard.close()


def order_event_files(folder: Path, now: float) -> None:
    """Rename event files that carry a time after `now`, as when the clock was set back: TensorBoard reads them by name."""
    found = sorted(folder.glob(EVENT_PREFIX + "*")) if folder.is_dir() else []
    if found and int(found[-1].name.removeprefix(EVENT_PREFIX).split(".")[0]) >= int(now):
        for number, path in enumerate(found):
            rest = path.name.removeprefix(EVENT_PREFIX).split(".", 1)[1]
            path.rename(folder / f"{EVENT_PREFIX}{number:010d}.{rest}")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off by a crash is left out.

    A value that was not finite is None.
    """
    path = run / JSONL
    lines = path.read_text().splitlines() if path.exists() else []
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(finite_or_null(json.loads(line)))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return metrics


def hyperparameters_of(optimizer: Optimizer) -> dict[str, float]:
    """Return the values that schedules change from step to step, for the metrics."""
    return {key: group[key] for group in optimizer.param_groups for key in RULES[group["rule"]].scheduled}
