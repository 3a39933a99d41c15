"""The doctor on two ranks through DeepSpeed's launcher."""

import re
from pathlib import Path

from tests.conftest import run_bitfleet, run_ranks


def test_two_ranks_are_examined(tiny: list[str], tmp_path: Path) -> None:
    done = run_ranks(2, "-m", "bitfleet.launch", "doctor", *tiny, "--output", tmp_path)
    assert done.returncode == 0, done.stdout
    (summary,) = re.findall(r"^(\d+) OK, (\d+) WARN, 0 FAIL$", done.stdout, re.MULTILINE)
    assert sum(map(int, summary)) == 29
    assert "OK    data           200 training and 28 validation images of 4 classes" in done.stdout
    assert re.search(r"^\w+ +clocks +[\d.e+]+ ms apart at most$", done.stdout, re.MULTILINE)  # one machine, one clock
    assert re.search(
        r"latency +median [\d.e+]+ ms, most .*: .* \(rank 0\) and .* \(rank 1\)$", done.stdout, re.MULTILINE
    )
    assert re.search(
        r"bandwidth +median [\d,]+ MB/s, .*; each rank in an all-gather [\d,]+ MB/s$", done.stdout, re.MULTILINE
    )
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_does_not_fit_its_data_fails(tiny: list[str], tmp_path: Path) -> None:
    fifteen = ("--model.num_classes", "15", "--output", tmp_path)
    done = run_bitfleet("doctor", *tiny, *fifteen)
    assert done.returncode == 1, done.stdout
    assert re.search(r"^FAIL  model +cannot train on .* \(rank 0\)$", done.stdout, re.MULTILINE)
    assert "pass --model.num_classes 4" in " ".join(done.stdout.split())


def test_what_fails_is_said_and_ends_with_1(tiny: list[str], tmp_path: Path) -> None:
    done = run_bitfleet("doctor", *tiny, "--data.root", tmp_path / "nothing", "--output", tmp_path)
    assert done.returncode == 1, done.stdout
    assert re.search(r"^FAIL  data +not readable on .* \(rank 0\)$", done.stdout, re.MULTILINE)
    assert re.search(r"-> data.root='\S+nothing' does not exist", " ".join(done.stdout.split()))
