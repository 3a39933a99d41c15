"""Inject faults into jobs of two ranks, and check what must hold after each."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitfleet.trainer.checkpoint.format import checkpoints, step_of, verify
from tests.conftest import BIN, HANGS, REPOSITORY, free_port, job_environment, start_python
from tests.faults.job import SAVE_POINTS
from tests.fork_server import ForkedProcess

Process = subprocess.Popen[str] | ForkedProcess
NUM_STEPS = 30
SAVE_EVERY = 3
GONE_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a job with a fault."""

    code: int
    output: str
    seconds: float
    """From the fault to the end of the last process; 0 if the fault was never reached."""
    steps_lost: int
    """Steps that are done again when the run continues."""


class Job:
    """One run that is started again and again in one folder.

    Args:
        options: those of the run.
        run: its folder.
        progress: file for the number of its last step.
        launcher: "forks", or "deepspeed" for faults that the launcher takes part in.
    """

    def __init__(self, options: list[str], run: Path, progress: Path, *, launcher: str = "forks") -> None:
        self.run, self.progress = run, progress
        self._launcher = launcher
        self._options = [
            *options,
            *("--run_dir", str(run), "--resume", "auto", "--num_replicas", "4", "--num_threads", "1"),
            *("--checkpoint.every_steps", str(SAVE_EVERY), "--stop_after_steps", str(NUM_STEPS)),
        ]

    def start(self, fault: dict[str, Any] | None = None, *further: str, step_seconds: float = 0.0) -> Process:
        """Start the job in its own session."""
        variables = {
            "BITFLEET_FAULT": json.dumps(fault or {}),
            "BITFLEET_PROGRESS": str(self.progress),
            "BITFLEET_STEP_SECONDS": str(step_seconds),
        }
        command = ["tests/faults/job.py", *self._options, *further]
        if self._launcher == "forks":
            return start_python(*command, num_ranks=2, **variables)
        return subprocess.Popen(
            [BIN / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), *command],
            cwd=REPOSITORY,
            env=job_environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def inject(
        self,
        fault: dict[str, Any] | None,
        *further: str,
        meanwhile: Callable[[Process], float] | None = None,
        step_seconds: float = 0.0,
    ) -> Outcome:
        """Run the job with `fault` to its end; check that all its processes end and that no
        checkpoint is lost.

        Args:
            fault: see job.py.
            further: options.
            meanwhile: called once the job is started; returns the time of the fault that it made.
            step_seconds: delay of every step.
        """
        before = newest_intact(self.run)
        marker = self.progress.with_name(self.progress.name + ".fault")
        self.progress.unlink(missing_ok=True)
        marker.unlink(missing_ok=True)
        job = self.start(fault, *further, step_seconds=step_seconds)
        try:
            fault_at = meanwhile(job) if meanwhile else None
            output, _ = job.communicate(timeout=HANGS)
            wait_until_gone(job.pid)
        finally:
            if group_exists(job.pid):
                os.killpg(job.pid, signal.SIGKILL)
        if marker.exists():
            fault_at = float(marker.read_text())
        seconds = time.monotonic() - fault_at if fault_at is not None else 0.0
        done = int(self.progress.read_text() or 0) if self.progress.exists() else 0
        for path in checkpoints(self.run):
            verify(path)
        newest = newest_intact(self.run)
        assert newest >= before, f"{before} had been committed, {newest} is the newest now"
        assert job.returncode is not None
        return Outcome(job.returncode, output, seconds, max(done - newest, 0))


def newest_intact(run: Path) -> int:
    """Return the step of the newest checkpoint that is as it was written; 0 without one."""
    for path in reversed(checkpoints(run)):
        with contextlib.suppress(ValueError):
            verify(path)
            return step_of(path)
    return 0


def wait_until_gone(group: int) -> None:
    give_up = time.monotonic() + GONE_SECONDS
    while group_exists(group):
        assert time.monotonic() < give_up, "processes are left"
        time.sleep(0.02)


def group_exists(pid: int) -> bool:
    """Return True if any process of the group is left, other than zombies."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return any(alive(pid, entry) for entry in Path("/proc").iterdir() if entry.name.isdecimal())


def alive(group: int, entry: Path) -> bool:
    try:
        state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(its_group) == group and state != "Z"


def kill_after(seconds: float, choose: str) -> Callable[[Process], float]:
    """Kill a rank of a job under deepspeed, or "all" its processes, `seconds` after its start."""

    def meanwhile(job: Process) -> float:
        time.sleep(seconds)
        if choose == "all":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
        for pid in members(job.pid):
            if f"--local_rank={choose}" in command_of(pid):
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(pid, signal.SIGKILL)
        return time.monotonic()

    return meanwhile


def members(group: int) -> list[int]:
    return sorted(
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and alive(group, entry)
    )


def command_of(pid: int) -> list[str]:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []
    return words if "job.py" in " ".join(words[:4]) else []


def damage_newest(run: Path, kind: str, generator: random.Random) -> None:
    """Damage the newest checkpoint as a disk or a person would."""
    newest = checkpoints(run)[-1]
    files = sorted(newest.glob("*.safetensors"))
    victim = newest / "meta.json" if kind == "meta" else generator.choice(files)
    if kind == "missing":
        victim.unlink()
    elif kind == "foreign":
        (newest / "shard-00009-model-00001-of-00001.safetensors").write_bytes(victim.read_bytes())
    elif kind == "truncated":
        os.truncate(victim, generator.randrange(victim.stat().st_size))
    else:
        content = bytearray(victim.read_bytes())
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        victim.write_bytes(content)


def random_fault(generator: random.Random, step: int) -> dict[str, Any]:
    """Draw a kill or a signal at a named point of a save or of training, soon after `step`."""
    at = step + generator.randrange(1, 8)
    rank = generator.randrange(2)
    kills = ["SIGKILL:self", "SIGKILL:self", "SIGKILL:self", "SIGKILL:all", "SIGKILL:agent", "SIGKILL:runner"]
    if generator.random() < 0.6:
        point = f"{generator.choice(SAVE_POINTS)}:{generator.choice(('before', 'after'))}"
        if not point.startswith(("begin", "write_tensors", "hash_files")):
            rank = 0  # which alone does the rest
        return {"rank": rank, "point": point, "step": at, "action": generator.choice(kills)}
    signals = [f"{kind}:self" for kind in ("SIGTERM", "SIGINT", "SIGUSR1")]
    signals += [f"{kind}:{target}" for kind in ("SIGTERM", "SIGINT") for target in ("agent", "runner")]
    others = ["nan", *(["STOP file"] if rank == 0 else [])]
    action = generator.choice([*kills, *signals, *others])
    if action == "nan" or action == "STOP file":
        point = "step"
    else:
        point = generator.choices(["step", "backward", "validation"], [2, 2, 1])[0]
    return {"rank": rank, "point": point, "step": at, "action": action}
