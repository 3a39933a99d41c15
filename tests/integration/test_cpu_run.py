"""Run on the CPU of a machine that has GPUs: CUDA is never started. In fresh processes: importing
counts too."""

import json
import sys
from pathlib import Path

from tests.conftest import run_command

COMMAND = """
import sys
import torch
import bitfleet.launch.preflight.preflight

def fail(*arguments):
    raise AssertionError("CUDA was started")

torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda._lazy_init = fail  # whatever touches a GPU comes through here first

from bitfleet.launch.{} import main
main()
"""


def test_cuda_is_started_nowhere(tiny: list[str], tmp_path: Path) -> None:
    """Load, train, log, save and validate; then evaluate, as if the run had decoded on a GPU."""
    run = tmp_path / "run"
    options = [*tiny, "--epochs", "1", "--device", "cpu", "--run_dir", run]
    done = run_command([sys.executable, "-c", COMMAND.format("train"), *options])
    assert done.returncode == 0, done.stdout
    assert "validation" in done.stdout
    assert (run / "checkpoints" / "step-00000012" / "meta.json").is_file()
    content = json.loads((run / "config.json").read_text())
    assert content["hardware"]["gpus"] == []
    content["config"]["data"]["device"] = "gpu"
    (run / "config.json").write_text(json.dumps(content))
    done = run_command([sys.executable, "-c", COMMAND.format("evaluate"), run, "--device", "cpu"])
    assert done.returncode == 0, done.stdout
    assert "28 images" in done.stdout
