"""Write the metrics of a run to metrics.jsonl and TensorBoard, and read them back."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfleet.optim.diagnostics import KEYS, LOG_RATIO, PI
from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.strict_json import finite_or_null, to_json

if TYPE_CHECKING:  # it takes a second to import, and only rank 0 needs it
    from torch.utils.tensorboard import SummaryWriter

JSONL = "metrics.jsonl"
TENSORBOARD = "tensorboard"
EVENT_PREFIX = "events.out.tfevents."
GROUP = "diagnostics"


class MetricsWriter:
    """Appends to metrics.jsonl and TensorBoard; only rank 0 has one.

    Args:
        run: run folder.
        start_step: what an earlier, interrupted part of the run logged after this step is dropped
            from both.
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
        """Log `values` of `kind` ("train" or "validation") after `step` optimizer steps;
        TensorBoard gets the numbers.

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
        """Write everything to the disk: a checkpoint of this step must not outlive its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._tensorboard.close()


def order_event_files(folder: Path, now: float) -> None:
    """Rename event files that carry a time after `now`, as when the clock was set back: TensorBoard
    reads them by name."""
    found = sorted(folder.glob(EVENT_PREFIX + "*")) if folder.is_dir() else []
    if found and int(found[-1].name.removeprefix(EVENT_PREFIX).split(".")[0]) >= int(now):
        for number, path in enumerate(found):
            rest = path.name.removeprefix(EVENT_PREFIX).split(".", 1)[1]
            path.rename(folder / f"{EVENT_PREFIX}{number:010d}.{rest}")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; a last line that was cut off by a crash is left
    out.

    A value that was not finite is None.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / JSONL
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not text at byte {error.start:,}; correct that line") from error
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(finite_or_null(json.loads(line)))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return metrics


def show_diagnostics(writer: "SummaryWriter", step: int, values: Mapping[str, Any], *, with_layout: bool) -> None:
    """Write `values` of `BitDiagnostics` after `step` optimizer steps.

    Overall values are diagnostics/<key>, those of a parameter <key>/<parameter>.

    Args:
        writer: of the run.
        step: optimizer steps done.
        values: what metrics.jsonl gets.
        with_layout: write also, once a file, which values the tab "custom scalars" shows in one
            chart.
    """
    if with_layout:
        writer.add_custom_scalars({GROUP: {key: ["Multiline", [f"{key}/.*"]] for key in (*KEYS, PI)}})
    for key, value in values.items():
        if key == LOG_RATIO:
            _show_histogram(writer, step, value["edges"], value["counts"])
        elif key != "since":
            writer.add_scalar(key if "/" in key else f"{GROUP}/{key}", value, step)


def _show_histogram(writer: "SummaryWriter", step: int, edges: Sequence[float], counts: Sequence[int]) -> None:
    """Show counts between `edges`; moments, which TensorBoard asks for, are those of the bins'
    centres."""
    number, limit = np.array(counts, dtype=np.float64), np.array(edges)
    centre = (limit[1:] + limit[:-1]) / 2
    (occupied,) = number.nonzero()
    writer.add_histogram_raw(
        f"{GROUP}/{LOG_RATIO}",
        min=limit[occupied[0]],
        max=limit[occupied[-1] + 1],
        num=int(number.sum()),
        sum=float(number @ centre),
        sum_squares=float(number @ centre**2),
        bucket_limits=limit[1:].tolist(),
        bucket_counts=number.tolist(),
        global_step=step,
    )
