"""Processes, a few at a time: each gets a place, a request to stop reaches all of them, and none outlives this one."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LOOK_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Job(NamedTuple):
    """A process to be run."""

    name: str
    command: tuple[str, ...]
    log: Path
    """Where its output goes, after what is there."""


class Ended(NamedTuple):
    """A process that has ended."""

    job: Job
    code: int
    """Return code; negative after a signal."""
    seconds: float
    stopped: bool
    """Whether it had been asked to stop."""
    output: str
    """What it said this time."""


class _Child(NamedTuple):
    job: Job
    process: subprocess.Popen[bytes]
    begun: float
    offset: int
    """Size of the log when it began."""


def run_jobs(jobs: Sequence[Job], places: Sequence[Mapping[str, str]], ended: Callable[[Ended], bool]) -> bool:
    """Run `jobs`, one in each of `places` at a time.

    SIGTERM, SIGINT, SIGUSR1 or SIGHUP: no further one starts, each that is running gets SIGTERM, and is waited for. A second
    SIGINT kills them. When this process dies, however that happens, the kernel sends them SIGTERM.

    Args:
        jobs: in the order of their start.
        places: what each place adds to the environment.
        ended: called after each end; true: the job is put at the end of the queue once more.

    Returns:
        Whether it was asked to stop.
    """
    queue, free = deque(jobs), list(range(len(places)))
    running: dict[int, _Child] = {}
    with _requests() as asked:
        told: set[int] = set()
        while running or (queue and not asked):
            while queue and free and not asked:
                place = free.pop(0)
                running[place] = _start(queue.popleft(), places[place])
            if asked:
                _ask(running.values(), told, kill=asked.count(signal.SIGINT) > 1)
            time.sleep(LOOK_SECONDS)
            for place in [place for place, child in running.items() if child.process.poll() is not None]:
                child = running.pop(place)
                free.append(place)
                if ended(_end(child, child.process.pid in told)):
                    queue.append(child.job)
        return bool(asked)


@contextlib.contextmanager
def _requests() -> Iterator[list[signal.Signals]]:
    """The signals that this process gets meanwhile; what is ignored (nohup) stays ignored."""
    asked: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        asked.append(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(job: Job, place: Mapping[str, str]) -> _Child:
    libc, parent = ctypes.CDLL(None), os.getpid()

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # which died before that
            os.kill(os.getpid(), signal.SIGTERM)

    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        offset = log.tell()
        process = subprocess.Popen(
            job.command,
            env={**os.environ, **place},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what a terminal sends reaches this process only
            preexec_fn=end_with_parent,
        )
        return _Child(job, process, time.monotonic(), offset)


def _ask(children: Iterable[_Child], told: set[int], *, kill: bool) -> None:
    """Ask each of `children` once to stop, or kill it with all below it."""
    for child in children:
        if kill:
            with contextlib.suppress(psutil.Error):
                top = psutil.Process(child.process.pid)
                for process in [*top.children(recursive=True), top]:
                    process.kill()
        elif child.process.pid not in told:
            child.process.terminate()
        told.add(child.process.pid)


def _end(child: _Child, stopped: bool) -> Ended:
    with child.job.log.open("rb") as log:
        log.seek(child.offset)
        output = log.read().decode(errors="replace")
    return Ended(child.job, child.process.returncode, time.monotonic() - child.begun, stopped, output)
