"""The update rule of docs/extending.md, added as one file to a copy of the sources, through every
command."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BIN, REPOSITORY, free_port

pytestmark = pytest.mark.slow
ROOMS = ("trainer", "optim", "models", "launch", "configs")
SWEEP = """
from dataclasses import replace

from bitfleet.configs.sweeps import s52_optimizers
from bitfleet.configs.sweeps.sweep import Point


def sweep():
    points = tuple(Point({"optimizer": rule}, ("--optim.rule", rule)) for rule in ("vote", "bop"))
    axes = {"optimizer": ("vote", "bop")}
    return replace(s52_optimizers.sweep(), name="votes", points=points, axes=axes, seeds=(0,))
"""


def example(name: str) -> str:
    """The code block of docs/extending.md that is marked with `name`."""
    page = (REPOSITORY / "docs" / "extending.md").read_text()
    found = re.search(rf"<!-- example: {name} -->\n```python\n(.*?)```", page, re.DOTALL)
    assert found, name
    return found[1]


def run(checkout: Path, *command: str) -> str:
    """Run a command of the copied sources to its end and return what it printed."""
    environment = os.environ | {"PYTHONPATH": f"{checkout}/src", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_rule_of_one_file_goes_through_every_command(tmp_path: Path) -> None:
    """Two ranks, resumed on one with equal bits, diagnostics, sweep, report, advise, checkpoint
    tools."""
    checkout = tmp_path / "checkout"
    for room in ROOMS:
        shutil.copytree(REPOSITORY / room, checkout / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "src" / "bitfleet", checkout / "src" / "bitfleet", symlinks=True)
    (checkout / "optim" / "rules" / "vote.py").write_text(example("rule"))
    (checkout / "configs" / "sweeps" / "votes.py").write_text(SWEEP)

    bitfleet = (sys.executable, "-m", "bitfleet.launch")
    options = (
        "--config fashion_small --optim.rule vote --model.width 8 --epochs 1 --num_replicas 2 --num_threads 1 "
        "--device cpu --metrics.every_steps 4 --metrics.diagnostics True --optim.gamma.start 0.1 "
        "--optim.gamma.kind constant --optim.threshold.start 0.1 --optim.threshold.kind constant"
    ).split()
    moved, straight = str(tmp_path / "moved"), str(tmp_path / "straight")
    deepspeed = ("deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "launch/train.py")
    run(checkout, *deepspeed, *options, "--run_dir", moved, "--stop_after_steps", "8")
    run(checkout, *bitfleet, "train", *options, "--resume", moved, "--stop_after_steps", "12")
    run(checkout, *bitfleet, "train", *options, "--run_dir", straight, "--stop_after_steps", "12")
    assert "same bits" in run(checkout, *bitfleet, "checkpoint", "diff", moved, straight)
    assert "vote" in run(checkout, *bitfleet, "checkpoint", "inspect", moved)
    run(checkout, *bitfleet, "checkpoint", "weights", moved, str(tmp_path / "weights.safetensors"))
    records = [json.loads(line) for line in (Path(moved) / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [4, 8, 12]
    assert all(record["threshold"] == 0.1 and record["flip_ratio"] > 0 for record in trained)
    assert any(record["kind"] == "diagnostics" for record in records)

    sweeps = str(tmp_path / "sweeps")
    run(checkout, *bitfleet, "sweep", "votes", "--output", sweeps, "--model.width", "8", "--epochs", "1")
    assert "report: " in run(checkout, *bitfleet, "report", f"{sweeps}/votes")
    assert "report: " in run(checkout, *bitfleet, "report", moved, "--output", str(tmp_path / "report"))
    assert "vote" in run(checkout, *bitfleet, "advise", "--config", "fashion_small", "--optim.rule", "vote")
    run(checkout, *bitfleet, "advise", moved)
