"""A sweep of real runs: interrupted, killed, with a run that fails, and continued to its end."""

import csv
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bitfleet.trainer.checkpoint.format import checkpoints
from bitfleet.trainer.metrics import read_metrics
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
NUM_STEPS = 60 * 12


def start(output: Path, tiny: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The sweep `regime`, two runs at once, as in its own terminal."""
    options = f"--seeds 0 --at_once 2 --output {output} --epochs 60".split()
    at = tiny.index("--epochs")  # the options set another number
    command = [sys.executable, "-m", "bitfleet.launch", "sweep", "regime", *options, *tiny[:at], *tiny[at + 2 :]]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}"}
    with log.open("ab") as file:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def is_running(process: psutil.Process) -> bool:
    """Return True if the process exists and is not a zombie; it may end between the two looks."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_interrupted_killed_and_failing_runs(tiny: list[str], tmp_path: Path) -> None:
    folder, log = tmp_path / "regime", tmp_path / "log"
    variants = ("published", "threshold-0", "frozen-v", "bop-threshold-0", "threshold-high")
    names = [f"variant-{name}-seed0" for name in variants]
    runs = {name: folder / "runs" / name for name in names}

    def under_way(count: int) -> bool:
        return sum(len(read_metrics(run)) > 0 for run in runs.values()) >= count

    # Ctrl-C while the first two run: both save, exit code 75.
    sweep = start(tmp_path, tiny, log)
    wait_for(lambda: under_way(2))
    sweep.send_signal(signal.SIGINT)
    assert sweep.wait(120) == 75, log.read_text()
    started = [run for run in runs.values() if checkpoints(run)]
    assert len(started) == 2
    assert {row["status"] for row in rows(folder).values()} == {"pending"}

    # Killed: the runs are asked to save by the kernel, and nobody is left.
    before = {run: len(read_metrics(run)) for run in started}
    sweep = start(tmp_path, tiny, log)
    wait_for(lambda: all(len(read_metrics(run)) > count for run, count in before.items()))
    children = psutil.Process(sweep.pid).children()
    assert len(children) == 2
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not any(map(is_running, children)), 60)
    assert [log_file.read_text().count("stopped by SIGTERM after step") for log_file in folder.glob("logs/*")] == [2, 2]

    # One run cannot have its folder: given up after two attempts, with its sentence; the others
    # come to their end.
    (taken,) = [run for run in runs.values() if run.name == "variant-threshold-high-seed0"]
    taken.mkdir(parents=True, exist_ok=True)
    with (taken / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 77 on elsewhere\n")
        lock.flush()
        sweep = start(tmp_path, tiny, log)
        assert sweep.wait(400) == 1, log.read_text()
    found = rows(folder)
    assert [found[name]["status"] for name in names] == ["finished"] * 4 + ["failed"]
    assert "is in use by process 77 on elsewhere" in found[taken.name]["error"]

    # And at last that one, alone.
    kept = {name: (runs[name] / "metrics.jsonl").stat().st_mtime_ns for name in names[:4]}
    sweep = start(tmp_path, tiny, log)
    assert sweep.wait(200) == 0, log.read_text()
    assert {name: (runs[name] / "metrics.jsonl").stat().st_mtime_ns for name in names[:4]} == kept
    for name, row in rows(folder).items():
        assert (row["status"], row["error"]) == ("finished", "")
        lines = read_metrics(runs[name])
        assert [line["step"] for line in lines if line["kind"] == "validation"] == list(range(12, NUM_STEPS + 1, 12))
        assert float(row["end.top1"]) == lines[-1]["top1"] > 0.5  # of 4 classes that brightness tells apart
