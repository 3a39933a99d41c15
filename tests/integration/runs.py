"""What tests of whole runs share: their length, and how two of them are compared."""

import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import checkpoints, verify
from bitfleet.trainer.metrics import read_metrics

TRAIN = "launch/train.py"
NUM_STEPS = 30  # 12 steps an epoch: two and a half epochs
TIMES = {"images_per_second", "data_wait_seconds", "seconds"}
TIMES |= {"slowest_rank", "slowest_host", "slowest_seconds", "median_seconds"}


def final_tensors(run: Path, num_steps: int = NUM_STEPS) -> dict[str, Tensor]:
    """Weights, buffers and moments of a run that has ended."""
    path = checkpoints(run)[-1]
    assert path.name == f"step-{num_steps:08d}"
    verify(path)
    return checkpoint_tensors.read(path, "")


def final_weights(run: Path, num_steps: int = NUM_STEPS) -> dict[str, Tensor]:
    """The model of a run that has ended."""
    shapes = verify(checkpoints(run)[-1])["model"]
    return checkpoint_tensors.model_state(final_tensors(run, num_steps), shapes)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()]
    assert not different


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run without the times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(run)]


def scalar_steps(run: Path, tag: str) -> list[int]:
    """The steps of a scalar as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def failed(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    """The job ended, not with 0, and one line says why."""
    assert done.returncode != 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("bitfleet: error")]
    assert len(lines) == 1, done.stdout
    assert sentence in lines[0]
    assert "Traceback" not in done.stdout
