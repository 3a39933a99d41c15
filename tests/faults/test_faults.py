"""Kill, signal, fill disks, damage files: nothing hangs, no checkpoint is lost, and the run ends
with the same bits."""

import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitfleet.trainer.checkpoint.format import checkpoints, latest_checkpoint, step_of
from bitfleet.trainer.ranks.exit_codes import REQUEUE
from tests.faults.harness import (
    GONE_SECONDS,
    NUM_STEPS,
    SAVE_EVERY,
    Job,
    Outcome,
    Process,
    damage_newest,
    kill_after,
    random_fault,
)
from tests.integration.runs import assert_same_bits, final_tensors, metrics, scalar_steps

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


@pytest.fixture(scope="module")
def undisturbed(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = Job(tiny, folder / "run", folder / "progress").inject(None)
    assert outcome.code == 0, outcome.output
    return folder / "run"


@pytest.fixture
def job(tiny: list[str], tmp_path: Path) -> Job:
    return Job(tiny, tmp_path / "run", tmp_path / "progress")


def finish(job: Job, undisturbed: Path) -> None:
    """Run the same command to the end: the bits and the log of the undisturbed run."""
    outcome = job.inject(None)
    assert outcome.code == 0, outcome.output
    assert_same_bits(final_tensors(undisturbed), final_tensors(job.run))
    assert metrics(undisturbed) == metrics(job.run)
    assert scalar_steps(job.run, "train/loss") == [5, 10, 15, 20, 25, 30]
    assert scalar_steps(job.run, "validation/loss") == [12, 24]


def stopped(outcome: Outcome, reason: str) -> None:
    assert outcome.code == REQUEUE, outcome.output
    assert re.search(rf"stopped by {reason} after step \d+; saved \d+\.\d s after it; exit code 75", outcome.output)


def test_killed_rank_before_a_commit_then_signal_in_validation_then_stop_file(job: Job, undisturbed: Path) -> None:
    """Disturb one run three times, and set the clock back in between."""
    outcome = job.inject({"rank": 0, "point": "commit:before", "step": 8, "action": "SIGKILL:self"})
    assert outcome.code not in (0, REQUEUE), outcome.output
    assert outcome.steps_lost <= 2 * SAVE_EVERY
    outcome = job.inject({"rank": 1, "point": "validation", "step": 11, "action": "SIGUSR1:self", "clock_back": 90000})
    stopped(outcome, "SIGUSR1")
    assert (checkpoints(job.run)[-1].name, outcome.steps_lost) == ("step-00000012", 0)
    assert not [line for line in metrics(job.run) if line["kind"] == "validation"]  # it was interrupted
    stopped(job.inject({"rank": 0, "point": "step", "step": 20, "action": "STOP file"}), "the file STOP")
    assert not (job.run / "STOP").exists()
    finish(job, undisturbed)


def test_nonfinite_gradient_stops_with_its_name_and_the_state_saved(job: Job, undisturbed: Path) -> None:
    fault = {"rank": 1, "point": "step", "step": 16, "action": "nan"}
    outcome = job.inject(fault, "--engine.on_nonfinite", "stop")
    assert outcome.code == 2, outcome.output
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("bitfleet: error")]
    assert re.search("blocks.2.conv.weight .*step 17.* saved", line)
    assert checkpoints(job.run)[-1].name == "step-00000016"
    finish(job, undisturbed)


def test_gpu_without_memory_ends_the_job_in_one_sentence(job: Job) -> None:
    """One rank fails; the other is in a collective."""
    outcome = job.inject({"rank": 1, "point": "backward", "step": 4, "action": "out of memory"})
    assert outcome.code not in (0, REQUEUE), outcome.output
    (line,) = [line for line in outcome.output.splitlines() if line.startswith("bitfleet: error")]
    assert line.startswith("bitfleet: error (rank 1): a GPU of ")
    assert re.search("4 images .*fp32.*--num_replicas 8 ", line)
    assert "Traceback" not in outcome.output


@pytest.mark.slow
def test_nonfinite_gradient_is_skipped_and_counted(job: Job) -> None:
    outcome = job.inject({"rank": 0, "point": "step", "step": 16, "action": "nan"})
    assert outcome.code == 0, outcome.output
    lines = [line for line in metrics(job.run) if line["kind"] == "train"]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert all(tensor.isfinite().all() for tensor in final_tensors(job.run).values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path]).returncode:
        pytest.skip("this root may not mount file systems")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@needs_root
def test_full_and_read_only_disk(tiny: list[str], small_disk: Path, tmp_path: Path, undisturbed: Path) -> None:
    job = Job(tiny, small_disk / "run", tmp_path / "progress")
    outcome = job.inject({"rank": 0, "point": "write_tensors:before", "step": 8, "action": f"fill:{small_disk}"})
    assert outcome.code == 2, outcome.output
    assert "No space left on device" in outcome.output
    assert "Traceback" not in outcome.output
    (small_disk / "filler").unlink()
    folder = job.run / "checkpoints"
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        outcome = job.inject({"rank": 0, "point": "write_tensors:before", "step": 14, "action": f"read-only:{folder}"})
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    assert outcome.code == 2, outcome.output
    assert "Read-only file system" in outcome.output
    finish(job, undisturbed)


DAMAGES = ("truncated", "flipped", "missing", "foreign", "meta")
SHARES = {"fault": 10, "moment": 5, "damage": 3, "second run": 1, "clock": 1}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("BITFLEET_FAULT_RUNS", "3"))))
def test_random_faults(seed: int, tiny: list[str], tmp_path: Path, undisturbed: Path) -> None:
    """Disturb runs as their seed draws until they reach their end; prints a line per fault."""
    generator = random.Random(seed)
    job = Job(tiny, tmp_path / "run", tmp_path / "progress", launcher="deepspeed")
    counts: Counter[str] = Counter()
    for number in range(12):
        newest = latest_checkpoint(job.run)
        step = step_of(newest) if newest else 0
        if step >= NUM_STEPS - 1:
            break
        kind = generator.choices([*SHARES], [*SHARES.values()])[0]
        name, outcome = disturb(kind, job, generator, step)
        counts[kind] += 1
        print(
            f"seed {seed} fault {number}: {name}: code {outcome.code}, {outcome.seconds:.1f} s, lost "
            f"{outcome.steps_lost}"
        )
        if "SIGKILL:agent" not in name and step_after(job) < NUM_STEPS:  # there the deepspeed command says 0
            assert outcome.code != 0, outcome.output
        assert outcome.steps_lost <= 2 * SAVE_EVERY, outcome.output
        assert outcome.seconds < GONE_SECONDS
    finish(job, undisturbed)
    shutil.rmtree(tmp_path)


def start_second(job: Job) -> Callable[[Process], float]:
    """Start a second run in the folder of one that is training; it must be refused."""

    def meanwhile(_: Process) -> float:
        give_up = time.monotonic() + 60
        while not job.progress.exists():
            assert time.monotonic() < give_up
            time.sleep(0.01)
        second = job.start()
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 2, output
        assert "is in use by process" in output
        return time.monotonic()

    return meanwhile


def step_after(job: Job) -> int:
    newest = latest_checkpoint(job.run)
    return step_of(newest) if newest else 0


def disturb(kind: str, job: Job, generator: random.Random, step: int) -> tuple[str, Outcome]:
    """Inject one fault of a kind; return its name and the outcome."""
    fault: dict[str, Any] = random_fault(generator, step)
    further = ["--engine.on_nonfinite", "stop"] if fault["action"] == "nan" else []
    if kind == "moment":
        victim, after = generator.choice(["0", "1", "all"]), generator.uniform(4, 12)
        return f"SIGKILL of {victim} after {after:.1f} s", job.inject(None, meanwhile=kill_after(after, victim))
    if kind == "damage" and len(checkpoints(job.run)) > 1:
        what = generator.choice(DAMAGES)
        damage_newest(job.run, what, generator)
        outcome = job.inject(fault, *further)
        assert "is damaged" in outcome.output, outcome.output
        return f"{what} file, then {fault['action']} at {fault['point']}", outcome
    if kind == "second run":
        outcome = job.inject(fault | {"step": step + 5}, *further, meanwhile=start_second(job), step_seconds=5.0)
        return f"second run, and {fault['action']}", outcome
    if kind == "clock":
        fault["clock_back"] = generator.randrange(10, 10**6)
    name = f"{fault['action']} of rank {fault['rank']} at {fault['point']}" + (
        " with the clock set back" * (kind == "clock")
    )
    return name, job.inject(fault, *further)
