"""Compare whole runs."""

import re
import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import checkpoints, verify
from bitfleet.trainer.metrics import read_metrics

TRAIN = "launch/train.py"
NUM_STEPS = 30  # two and a half epochs of 12 steps
TIMES = {"images_per_second", "data_wait_seconds", "seconds"}
TIMES |= {"slowest_rank", "slowest_host", "slowest_seconds", "median_seconds"}


def final_tensors(run: Path, num_steps: int = NUM_STEPS) -> dict[str, Tensor]:
    """Return weights, buffers and moments of a run that has ended."""
    path = checkpoints(run)[-1]
    assert path.name == f"step-{num_steps:08d}"
    verify(path)
    return checkpoint_tensors.read(path, "")


def final_weights(run: Path, num_steps: int = NUM_STEPS) -> dict[str, Tensor]:
    """Return the model of a run that has ended."""
    shapes = verify(checkpoints(run)[-1])["model"]
    return checkpoint_tensors.model_state(final_tensors(run, num_steps), shapes)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()]
    assert not different


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run without the times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run)]


def scalar_steps(run: Path, tag: str) -> list[int]:
    """Return the steps of a scalar as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def failed(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check that the job failed and that one line says why, with these words (names, values) in
    this order."""
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("bitfleet: error")]
    assert len(lines) == 1, done.stdout
    assert re.search(".*".join(map(re.escape, words)), lines[0]), lines[0]
    assert "Traceback" not in done.stdout
