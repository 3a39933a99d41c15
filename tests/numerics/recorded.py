"""Record what training must go on to compute: losses, and the bits of weights and optimizer state.

`python -m tests.numerics.recorded` rewrites tests/golden/recorded.json; the commit says why
training changed. As a job, `torchrun -m tests.numerics.recorded FOLDER [--stop_at STEP] NAME...`
trains the named recordings on its ranks below FOLDER and writes FOLDER/found.json.
"""

import dataclasses
import hashlib
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bitfleet.configs.sweeps.s52_optimizers import OPTIMIZERS
from bitfleet.launch.job import job, run
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import checkpoints
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.metrics import read_metrics
from bitfleet.trainer.trainer import Trainer

RECORDED = Path(__file__).parents[1] / "golden" / "recorded.json"
NUM_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Recording:
    """A run whose losses and bits are recorded."""

    options: str
    num_steps: int


RULES = {
    f"s52: {name}": Recording(
        f"--config fashion_small --num_replicas 2 --epochs 1 --metrics.every_steps 5 {options}", NUM_STEPS
    )
    for name, options in OPTIMIZERS.items()
}
"""Every rule of section 5.2: the same bits on one rank, on two, and resumed."""
CURVES = {
    "fashion_small": Recording("--config fashion_small --epochs 1 --metrics.every_steps 1", 20),
    "fashion_dry_run": Recording("--config fashion_dry_run --epochs 1 --metrics.every_steps 1", 20),
    "fashion_quickstart": Recording("--config fashion_quickstart --epochs 2 --metrics.every_steps 1", 15),
}
"""Every embedded configuration; one rank."""
LONG = {"fashion_quickstart, 2 epochs": Recording("--config fashion_quickstart --epochs 2", 92)}
RECORDINGS = RULES | CURVES | LONG


def machine() -> str:
    """Describe what the bits of a sum depend on besides the program: CPU, vector unit, torch."""
    with Path("/proc/cpuinfo").open() as lines:
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
    cpu = " ".join(value.strip() for key, value in facts.items() if key.strip() in ("model name", "cpu family"))
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.split('+')[0]}"


def config_of(recording: Recording, folder: Path) -> TrainConfig:
    """The run in `folder`; threads are fixed, since sums depend on them."""
    options = f"{recording.options} --device cpu --num_threads 1 --run_dir {folder} --resume auto"
    return parse_train(shlex.split(options), "recorded")


def outcome(folder: Path) -> dict[str, Any]:
    """Losses of the run in `folder`, and the hash of its last checkpoint's weights and optimizer
    state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint_tensors.read(checkpoints(folder)[-1], "").items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    losses = [line["loss"] for line in read_metrics(folder) if line["kind"] == "train"]
    return {"losses": losses, "sha256": digest.hexdigest()}


def record(names: list[str], folder: Path, *, stop_at: int | None = None) -> dict[str, dict[str, Any]]:
    """Train the recordings `names` on the ranks of this job; with `stop_at` each is stopped there
    and resumed."""
    found = {}
    configs = {name: config_of(RECORDINGS[name], folder / f"{number}") for number, name in enumerate(names)}
    with job("cpu", configs[names[0]]) as (ranks, device):
        for name, config in configs.items():
            num_steps = RECORDINGS[name].num_steps
            for last in [stop_at, num_steps] if stop_at else [num_steps]:
                Trainer(dataclasses.replace(config, stop_after_steps=last), ranks, device).train()
            assert config.run_dir is not None
            found[name] = outcome(config.run_dir) if ranks.is_main else {}
    return found


def main() -> None:
    """Entry point."""
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder:
            found = record(list(RECORDINGS), Path(folder))
        RECORDED.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")
        return
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    stop_at = None
    if names[0] == "--stop_at":
        stop_at, names = int(names[1]), names[2:]
    folder.mkdir(exist_ok=True)
    found = record(names, folder, stop_at=stop_at)
    if os.environ.get("RANK", "0") == "0":
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(main)
