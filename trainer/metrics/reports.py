"""What a run tells: its folder's files, TensorBoard and the progress bar.

Rank 0 writes, the others have the same object; of the flip journal each writes its share.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.journal.writer import open_journal
from bitfleet.trainer.metrics.loss_watch import LossWatch
from bitfleet.trainer.metrics.metrics import Accuracy, MetricsWriter, read_metrics
from bitfleet.trainer.metrics.progress import Progress
from bitfleet.trainer.metrics.readings import Reading
from bitfleet.trainer.ranks.collectives import Ranks, from_first_rank
from bitfleet.trainer.run.folder import write_config


class Reports:
    """Opens the files of a run at `step`; what an earlier part of it wrote after that is dropped.

    Args:
        config: the run.
        path: its folder.
        ranks: this process's place.
        step: optimizer steps done.
        num_steps: of the whole run.
        steps_per_epoch: global batches in an epoch.
        facts: for config.json.
        routing: the table of parameters.
        optimizer: what the journal, if there is one, hears of flips from.

    Raises:
        ValueError: the journal cannot be begun.
    """

    def __init__(
        self,
        config: TrainConfig,
        path: Path,
        ranks: Ranks,
        *,
        step: int,
        num_steps: int,
        steps_per_epoch: int,
        facts: dict[str, Any],
        routing: str,
        optimizer: Optimizer,
    ) -> None:
        self.latest: dict[str, dict[str, float | str | None]] = {}
        """The last line of "train" and of "validation", on rank 0."""
        self._config, self._steps_per_epoch = config, steps_per_epoch
        self._log: MetricsWriter | None = None
        if ranks.is_first:
            write_config(path, config, facts)
            self._log = MetricsWriter(path, step)
            self._log.write_text("config", (path / "config.json").read_text())
            self._log.write_text("routing", routing)
            lines = [line for line in read_metrics(path) if line["kind"] in ("train", "validation")]
            losses = [line["loss"] for line in lines if line["kind"] == "train"]
            self._loss_watch = LossWatch(config.model.num_classes, losses)
            self.latest = {line.pop("kind"): line for line in lines}
        self._journal = open_journal(config.journal.enabled, path, ranks, optimizer)
        self._progress = Progress(
            start_step=step, num_steps=num_steps, steps_per_epoch=steps_per_epoch, visible=ranks.is_first
        )

    def has_validation(self, step: int) -> bool:
        """Whether the validation after `step` has been reported; every rank calls this."""
        return bool(from_first_rank(self.latest.get("validation", {}).get("step") == step))

    def train(self, step: int, reading: Reading, hyperparameters: Mapping[str, float]) -> None:
        """Report training since the last report: means, what else was read, and the time that it took.

        Where every step was skipped there are no means: they are None.
        """
        if self._log is None:
            return
        accuracy, further, speed = reading.train, reading.further, reading.images_per_second
        has_means = accuracy.num_images > 0
        values: dict[str, float | str | None] = {
            "loss": accuracy.loss if has_means else None,
            "top1": accuracy.top1 if has_means else None,
            "top5": accuracy.top5 if has_means else None,
            "epoch": step / self._steps_per_epoch,
            **hyperparameters,
            **further,
            "images_per_second": speed,
            "data_wait_seconds": reading.data_seconds,
            "seconds": reading.seconds,
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
        """Report a validation, and say `remark` after it."""
        self._write("validation", step, accuracy._asdict())
        self._progress.say(
            f"epoch {step // self._steps_per_epoch}/{self._config.epochs}: validation loss {accuracy.loss:.3f} "
            f"top-1 {accuracy.top1:.2%} top-5 {accuracy.top5:.2%} ({accuracy.num_images:,} images)"
        )
        if remark:
            self._progress.say(remark)

    def skipped(self, step: int, num_skipped: int) -> None:
        """Say at the end how many of the run's `step` steps were skipped, if any."""
        if num_skipped:
            why = ", as fp16 needs to find its loss scale" if self._config.engine.precision == "fp16" else ""
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
        """Bring what was reported to the disk.

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
