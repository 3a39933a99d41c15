"""Run a launcher as a child: forward requests to stop, leave no process behind, return the exit
code of the job."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from bitfleet.launch import processes
from bitfleet.trainer.ranks.exit_codes import REQUEUE

FILE_SECONDS = 5.0
KILLED = 128
"""Added to the number of the signal that ended a process, as shells do."""
AGENT = "deepspeed.launcher.launch"
Ask = Callable[[signal.Signals], None]


def supervise(command: Sequence[str], environ: Mapping[str, str], ask: Ask) -> int:
    """Run `command` to its end and return the exit code of the job.

    DeepSpeed's command returns 0 when its own child is killed by a signal, and leaves the ranks
    behind when it is killed itself. So this process adopts the processes that its children leave
    behind, waits for them, and takes their exit codes.

    Args:
        command: the launcher.
        environ: its environment.
        ask: called repeatedly with SIGTERM, SIGUSR1 or SIGINT, from when this process got it until
            the job ends (SIGHUP counts as SIGTERM). A second SIGINT kills the job instead.
    """
    processes.adopt_orphans()
    with processes.requests_to_stop() as requests:
        child = processes.start(command, environ, death_signal=signal.SIGKILL)
        while child.poll() is None:
            _attend(requests, ask)
        adopted = [process.pid for process in processes.descendants() if process.ppid() == os.getpid()]
        codes = [_await(pid, requests, ask) for pid in adopted]
        while processes.descendants():  # workers of the ranks
            _attend(requests, ask)
            processes.reap()
        return job_code(child.returncode, codes, interrupted=processes.wants_kill(requests))


def job_code(launcher: int, left_behind: Sequence[int], *, interrupted: bool = False) -> int:
    """Return the exit code of a job.

    Args:
        launcher: return code of the launcher; negative after a signal.
        left_behind: return codes of the ranks (or of the agent) that outlived it.
        interrupted: True if it was killed on request.
    """
    if interrupted:
        return KILLED + signal.SIGINT
    if launcher > 0:
        return launcher
    if bad := [code for code in left_behind if code not in (0, REQUEUE)]:
        return bad[0] if bad[0] > 0 else KILLED - bad[0]
    if REQUEUE in left_behind:
        return REQUEUE
    if left_behind and launcher < 0:  # the launcher was killed, and the ranks finished anyway
        return 0
    return KILLED - launcher if launcher < 0 else 0


def ask_ranks(number: signal.Signals, told: set[int]) -> None:
    """Send `number` at once to every rank below this process that is not in `told` yet; the ranks
    agree on a step.

    DeepSpeed's own agent would end them one after the other, with 30 s for each.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if parent and AGENT in parent.cmdline() and AGENT not in process.cmdline() and process.pid not in told:
                told.add(process.pid)
                process.send_signal(number)


def ask_by_file(path: Path, written: list[float]) -> None:
    """Create the file at `path` for the ranks on any host; again every 5 s, because a run removes
    it at its start."""
    if path.parent.is_dir() and (not written or time.monotonic() - written[-1] >= FILE_SECONDS):
        written.append(time.monotonic())
        path.touch()


def _attend(requests: list[signal.Signals], ask: Ask) -> None:
    if processes.wants_kill(requests):
        processes.kill(processes.descendants())
    elif requests:
        ask(signal.SIGTERM if requests[0] == signal.SIGHUP else requests[0])
    time.sleep(processes.POLL_SECONDS)


def _await(pid: int, requests: list[signal.Signals], ask: Ask) -> int:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        _attend(requests, ask)
