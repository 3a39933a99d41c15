"""Preflight through the launcher: counted traffic, measured memory, and the rehearsal of `full`."""

import re
from pathlib import Path

import pytest

from tests.conftest import run_bitfleet, run_ranks
from tests.integration.runs import TRAIN, assert_same_bits, failed, final_tensors, metrics

NUM_STEPS = 21


@pytest.mark.parametrize("options", [[], ["--num_replicas", "4"], ["--engine.grad_comm_dtype", "bf16"]])
def test_traffic_is_what_is_counted(options: list[str], tiny: list[str], tmp_path: Path) -> None:
    done = run_ranks(2, "tests/integration/preflight_job.py", *tiny, "--run_dir", tmp_path / "run", *options)
    assert done.returncode == 0, done.stdout
    (found,) = re.findall(r"^predicted ([\d.]+) counted ([\d.]+)$", done.stdout, re.MULTILINE)
    assert found[0] == found[1]


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_full_changes_no_bit_of_the_run(num_ranks: int, tiny: list[str], tmp_path: Path) -> None:
    outputs = []
    for kind in ("basic", "full"):
        options = ["--run_dir", tmp_path / kind, "--stop_after_steps", str(NUM_STEPS), "--preflight", kind]
        done = run_ranks(num_ranks, TRAIN, *tiny, *options)
        assert done.returncode == 0, done.stdout
        outputs.append(done.stdout)
    assert_same_bits(*(final_tensors(tmp_path / kind, NUM_STEPS) for kind in ("basic", "full")))
    assert metrics(tmp_path / "basic") == metrics(tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"basic", "full"}

    basic, full = outputs
    assert not re.findall("^preflight:", basic, re.MULTILINE)
    steps, saved, others = re.findall("^preflight: (.*)$", full, re.MULTILINE)
    assert steps.startswith("2 optimizer steps of birealnet_small")
    assert saved.endswith("read back: equal bits")
    assert (
        others
        == ("read as 1 rank and as 2 ranks would: equal bits", "read as 1 rank and as 4 ranks would: equal bits")[
            num_ranks - 1
        ]
    )
    for output in outputs:
        assert "expected time: unknown until 20 steps are done" in output
        assert re.search(r"^expected time: 0:\d\d:\d\d until step 21 \(", output, re.MULTILINE)
        (peak,) = re.findall(r"^memory of rank 0, measured in step 1: ([\d.]+) MB of tensors", output, re.MULTILINE)
        assert 1 < float(peak) < 100


def test_failure_is_a_sentence_and_leaves_nothing(tiny: list[str], tmp_path: Path) -> None:
    """The disk of the run cannot be written: a folder that is a file."""
    (tmp_path / "file").touch()
    command = ["train", *tiny, "--preflight", "full"]
    done = run_bitfleet(*command, "--run_dir", tmp_path / "file" / "run")
    failed(done, "--preflight full: making a folder for it failed: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    overflow = ["--engine.on_nonfinite", "stop", "--data.std", "1e-40", "1e-40", "1e-40"]
    done = run_bitfleet(*command, "--run_dir", tmp_path / "run", *overflow)
    failed(done, "--preflight full: 2 optimizer steps failed: ", "is not finite in step 1", "data.std")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
