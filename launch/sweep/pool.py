"""Run processes, a few at a time: a request to stop reaches all of them, and none outlives this
process."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bitfleet.launch import processes


class Job(NamedTuple):
    """A process to be run."""

    name: str
    command: tuple[str, ...]
    log: Path
    """File to which its output is appended."""


class Ended(NamedTuple):
    """A process that has ended."""

    job: Job
    code: int
    """Return code; negative after a signal."""
    seconds: float
    stopped: bool
    """True if it was asked to stop."""
    output: str
    """Its output of this attempt."""


class _Child(NamedTuple):
    job: Job
    process: subprocess.Popen[bytes]
    start_time: float
    offset: int
    """Size of the log at the start."""


def run_jobs(jobs: Sequence[Job], places: Sequence[Mapping[str, str]], ended: Callable[[Ended], bool]) -> bool:
    """Run `jobs`, one in each of `places` at a time; return True if this process was asked to stop.

    After SIGTERM, SIGINT, SIGUSR1 or SIGHUP no further job starts, and each running one gets
    SIGTERM and is waited for. A second SIGINT kills them. When this process dies, even by SIGKILL,
    the kernel sends them SIGTERM.

    Args:
        jobs: in the order of their start.
        places: environment variables that each place adds.
        ended: called after each end; it returns True to queue the job again.
    """
    queue, free = deque(jobs), list(range(len(places)))
    running: dict[int, _Child] = {}
    with processes.requests_to_stop() as requests:
        asked: set[int] = set()
        while running or (queue and not requests):
            while queue and free and not requests:
                place = free.pop(0)
                running[place] = _start(queue.popleft(), places[place])
            for child in running.values() if requests else ():
                if processes.wants_kill(requests):
                    processes.kill(processes.descendants(child.process.pid))
                    child.process.kill()
                elif child.process.pid not in asked:
                    child.process.terminate()
                asked.add(child.process.pid)
            time.sleep(processes.POLL_SECONDS)
            for place in [place for place, child in running.items() if child.process.poll() is not None]:
                child = running.pop(place)
                free.append(place)
                if ended(_end(child, child.process.pid in asked)):
                    queue.append(child.job)
        return bool(requests)


def _start(job: Job, place: Mapping[str, str]) -> _Child:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        offset = log.tell()
        process = processes.start(job.command, {**os.environ, **place}, death_signal=signal.SIGTERM, output=log)
    return _Child(job, process, time.monotonic(), offset)


def _end(child: _Child, stopped: bool) -> Ended:
    with child.job.log.open("rb") as log:
        log.seek(child.offset)
        output = log.read().decode(errors="replace")
    return Ended(child.job, child.process.returncode, time.monotonic() - child.start_time, stopped, output)
