"""Report a run: files of its folder, TensorBoard and the progress bar.

Rank 0 writes; the other ranks have the same object, and each writes its share of the flip journal.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from bitfleet.trainer.journal.writer import open_journal
from bitfleet.trainer.metrics.accuracy import Accuracy
from bitfleet.trainer.metrics.progress import Progress
from bitfleet.trainer.metrics.step_observer import StepReport
from bitfleet.trainer.metrics.writer import MetricsWriter, read_metrics
from bitfleet.trainer.ranks.collectives import Ranks, broadcast_object

FACTOR = 100.0
"""Two orders of magnitude."""
SMALLEST_PART = 0.1
"""Fraction of the loss of guessing below which a smaller loss does not lower the reference, or
noise would count."""


class LossWatch:
    """Compares each reported loss with the smallest one before it, and with the loss of guessing.

    Args:
        num_classes: guessing has the loss log(num_classes), with which a network starts or which it
            soon reaches.
        earlier: losses that the run has reported before it was resumed; None for a report without
            images.
        scale: factor of the loss.
    """

    def __init__(self, num_classes: int, earlier: Iterable[float | None] = (), scale: float = 1.0) -> None:
        guessing = scale * math.log(max(num_classes, 2))
        self._floor, self._smallest, self._said = SMALLEST_PART * guessing, guessing, 0.0
        for loss in earlier:
            if loss is not None:
                self.sentence(0, loss)

    def sentence(self, step: int, loss: float) -> str:
        """Return a warning about the loss up to `step`, once per two orders of magnitude, else
        ""."""
        self._smallest = min(self._smallest, max(loss, self._floor))
        if not loss >= FACTOR * max(self._smallest, self._said):
            return ""
        self._said = loss
        return (
            f"the training loss grew to {loss:.3g} at step {step:,}, {loss / self._smallest:,.0f} times the smallest "
            f"before it ({self._smallest:.3g}): the run diverges, a lower learning rate or threshold schedule is needed"
        )


class Reports:
    """Open the files of a run at `step`; what an earlier part of it wrote after that is dropped.

    Args:
        path: the run folder, with its config.json.
        ranks: this process's place.
        step: optimizer steps done.
        num_steps: length of the run in steps.
        num_epochs: length of the run in epochs.
        num_classes: that the network tells apart.
        loss_scale: factor of the loss, relative to a cross-entropy.
        scales_loss: whether fp16 looks for its loss scale by skipping steps.
        routing: the table of parameters.
        has_journal: whether flips are written into a journal.
        optimizer: tells the journal of its flips.

    Raises:
        ValueError: the journal cannot be started.
    """

    def __init__(
        self,
        path: Path,
        ranks: Ranks,
        *,
        step: int,
        num_steps: int,
        num_epochs: int,
        num_classes: int,
        loss_scale: float,
        scales_loss: bool,
        routing: str,
        has_journal: bool,
        optimizer: Optimizer,
    ) -> None:
        self.latest: dict[str, dict[str, float | str | None]] = {}
        """Last line of "train" and of "validation", on rank 0."""
        self._num_epochs, self._steps_per_epoch = num_epochs, num_steps // num_epochs
        self._scales_loss = scales_loss
        self._log: MetricsWriter | None = None
        if ranks.is_main:
            self._log = MetricsWriter(path, step)
            self._log.write_text("config", (path / "config.json").read_text())
            self._log.write_text("routing", routing)
            lines = [line for line in read_metrics(path) if line["kind"] in ("train", "validation")]
            losses = [line["loss"] for line in lines if line["kind"] == "train"]
            self._loss_watch = LossWatch(num_classes, losses, loss_scale)
            self.latest = {line.pop("kind"): line for line in lines}
        self._journal = open_journal(has_journal, path, ranks, optimizer)
        self._progress = Progress(
            start_step=step, num_steps=num_steps, steps_per_epoch=self._steps_per_epoch, visible=ranks.is_main
        )

    def has_validation(self, step: int) -> bool:
        """Return True if the validation after `step` has been reported; every rank calls this."""
        return bool(broadcast_object(self.latest.get("validation", {}).get("step") == step))

    def train(self, step: int, report: StepReport, hyperparameters: Mapping[str, float]) -> None:
        """Report training since the last report: means, what else was read, and the time that it
        took.

        If every step was skipped there are no means: they are None.
        """
        if self._log is None:
            return
        accuracy, further, speed = report.train, report.further, report.images_per_second
        has_means = accuracy.num_images > 0
        values: dict[str, float | str | None] = {
            "loss": accuracy.loss if has_means else None,
            "top1": accuracy.top1 if has_means else None,
            "top5": accuracy.top5 if has_means else None,
            "epoch": step / self._steps_per_epoch,
            **hyperparameters,
            **further,
            "images_per_second": speed,
            "data_wait_seconds": report.data_seconds,
            "seconds": report.seconds,
        }
        self._write("train", step, values)
        self._progress.update(
            step,
            loss=accuracy.loss if has_means else None,
            top1=accuracy.top1,
            images_per_second=speed,
            flip_ratio=None if (flips := further.get("flip_ratio")) is None else float(flips),
            num_skipped=int(further["skipped_steps"]),
        )
        if has_means and (sentence := self._loss_watch.sentence(step, accuracy.loss)):
            self._progress.say(sentence)

    def validation(self, step: int, accuracy: Accuracy, remark: str = "") -> None:
        """Report a validation, and print `remark` after it."""
        self._write("validation", step, accuracy._asdict())
        self._progress.say(
            f"epoch {step // self._steps_per_epoch}/{self._num_epochs}: validation loss {accuracy.loss:.3f} "
            f"top-1 {accuracy.top1:.2%} top-5 {accuracy.top5:.2%} ({accuracy.num_images:,} images)"
        )
        if remark:
            self._progress.say(remark)

    def skipped(self, step: int, num_skipped: int) -> None:
        """Print at the end how many of the run's `step` steps were skipped, if any."""
        if num_skipped:
            why = ", as fp16 needs to find its loss scale" if self._scales_loss else ""
            self._progress.say(
                f"{num_skipped:,} of {step:,} steps were skipped, because a gradient was not finite{why}"
            )

    def diagnostics(self, step: int, values: Mapping[str, Any]) -> None:
        """Report the diagnostics of bits after `step`, if there are any."""
        if self._log is not None and values:
            self._log.write_diagnostics(step, values)

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        self._progress.say(text)

    def _write(self, kind: str, step: int, values: Mapping[str, float | str | None]) -> None:
        if self._log is not None:
            self._log.write(kind, step, values)
            self.latest[kind] = {"step": step, **values}

    def flush(self) -> None:
        """Write everything that was reported to the disk.

        Raises:
            ValueError: the journal could not be written.
        """
        if self._journal is not None:
            self._journal.flush()
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Close everything; the progress bar stays as it is.

        Raises:
            ValueError: the journal could not be written.
        """
        self._progress.close()
        if self._journal is not None:
            self._journal.close()
        if self._log is not None:
            self._log.close()
