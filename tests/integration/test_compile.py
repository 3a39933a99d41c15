"""Train with a compiled network."""

import shutil
from pathlib import Path

import pytest

from bitfleet.trainer.checkpoint.format import checkpoints, read_meta
from tests.conftest import BIN, run_command, run_python, run_ranks
from tests.integration.runs import TRAIN, assert_same_bits, failed, final_tensors

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")]
SECONDS = 600


def test_a_compiled_run_is_continued_as_one(tiny: list[str], tmp_path: Path) -> None:
    """Two ranks compile, validate eagerly, stop and resume without --model.compile: the bits of an
    uninterrupted run."""
    # The first step, on real weights, is not compiled.
    options = [*tiny, "--num_threads", "1", "--resume", "auto", "--model.initial_weights", "real"]
    straight = ["--run_dir", tmp_path / "straight", "--model.compile", "on"]
    parts = ["--run_dir", tmp_path / "parts"]
    for arguments, last in ((straight, 14), ([*parts, "--model.compile", "on"], 5), (parts, 14)):
        done = run_ranks(2, TRAIN, *options, *arguments, "--stop_after_steps", str(last), timeout=SECONDS)
        assert done.returncode == 0, done.stdout
        assert "runs in eager torch" not in done.stdout
    assert_same_bits(final_tensors(tmp_path / "straight", 14), final_tensors(tmp_path / "parts", 14))
    assert read_meta(checkpoints(tmp_path / "parts")[-1])["model.compile"] == "on"
    refused = run_python(TRAIN, *options, *parts, "--model.compile", "off", "--num_replicas", "2")
    failed(refused, "model.compile", "'on'", "'off'")


def test_without_a_compiler_it_runs_eagerly(tiny: list[str], tmp_path: Path) -> None:
    command = [BIN / "python", TRAIN, *tiny, "--run_dir", tmp_path / "run", "--stop_after_steps", "2"]
    done = run_command(["env", "CXX=/nowhere/g++", *command, "--model.compile", "on"], timeout=SECONDS)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("the network runs in eager torch, slower: rank 0 cannot compile") == 1
    assert read_meta(checkpoints(tmp_path / "run")[-1])["model.compile"] == "off"
