"""A launcher as a child: requests to stop reach the ranks, nobody is left behind, and the exit code tells how the job ended."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from bitfleet.trainer.ranks.exit_codes import REQUEUE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LOOK_SECONDS = 0.2
FILE_SECONDS = 5.0
KILLED = 128
"""Added to the number of the signal that ended a process, as shells do."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
AGENT = "deepspeed.launcher.launch"
Ask = Callable[[signal.Signals], None]


def supervise(command: Sequence[str], environ: Mapping[str, str], ask: Ask) -> int:
    """Run `command` to its end; the exit code of the job.

    DeepSpeed's command returns 0 when its own child is killed by a signal, and leaves the ranks behind when it is killed itself.
    So this process adopts what its children leave behind (as a Linux "child subreaper"), waits for it, and takes its exit codes.

    Args:
        command: the launcher; it gets a session of its own, so that what a terminal sends reaches this process only.
        environ: its environment.
        ask: called again and again with SIGTERM, SIGUSR1 or SIGINT, from when this process got it until the job ends (SIGHUP
            counts as SIGTERM). A second SIGINT kills the job instead.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    requests: list[signal.Signals] = []
    before = _listen(requests)
    child = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    try:
        while child.poll() is None:
            _attend(requests, ask)
        adopted = [process.pid for process in _family() if process.ppid() == os.getpid()]
        codes = [_await(pid, requests, ask) for pid in adopted]
        while _family():  # workers of the ranks
            _attend(requests, ask)
            _reap()
        return job_code(child.returncode, codes, interrupted=requests.count(signal.SIGINT) > 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def job_code(launcher: int, left_behind: Sequence[int], *, interrupted: bool = False) -> int:
    """The exit code of a job.

    Args:
        launcher: return code of the launcher; negative after a signal.
        left_behind: return codes of the ranks (or of the agent) that outlived it.
        interrupted: whether it was killed on request.
    """
    if interrupted:
        return KILLED + signal.SIGINT
    if launcher > 0:
        return launcher
    if bad := [code for code in left_behind if code not in (0, REQUEUE)]:
        return bad[0] if bad[0] > 0 else KILLED - bad[0]
    if REQUEUE in left_behind:
        return REQUEUE
    if left_behind and launcher < 0:  # the launcher was killed, and the ranks came to their end all the same
        return 0
    return KILLED - launcher if launcher < 0 else 0


def ask_ranks(number: signal.Signals, told: set[int]) -> None:
    """Send `number` to every rank below this process that is not in `told` yet, to all at once; they agree on a step.

    DeepSpeed's own agent would end them one after the other, with 30 s for each.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if parent and AGENT in parent.cmdline() and AGENT not in process.cmdline() and process.pid not in told:
                told.add(process.pid)
                process.send_signal(number)


def ask_by_file(path: Path, written: list[float]) -> None:
    """Leave the file at `path` for the ranks, wherever they are; again every 5 s, because a run that begins removes it."""
    if path.parent.is_dir() and (not written or time.monotonic() - written[-1] >= FILE_SECONDS):
        written.append(time.monotonic())
        path.touch()


def _listen(requests: list[signal.Signals]) -> dict[signal.Signals, Any]:
    """Note each signal in `requests`; the handlers that were there before. What is ignored (nohup) stays ignored."""

    def note(number: int, _: FrameType | None) -> None:
        requests.append(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    return before


def _attend(requests: list[signal.Signals], ask: Ask) -> None:
    if requests.count(signal.SIGINT) > 1:
        for process in _family():
            with contextlib.suppress(psutil.Error):
                process.kill()
    elif requests:
        ask(signal.SIGTERM if requests[0] == signal.SIGHUP else requests[0])
    time.sleep(LOOK_SECONDS)


def _await(pid: int, requests: list[signal.Signals], ask: Ask) -> int:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        _attend(requests, ask)


def _reap() -> None:
    """Take the exit codes of adopted processes that have ended, which nobody asks for."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _family() -> list[psutil.Process]:
    """The processes below this one, but for a connection that ssh shares (ControlPersist), which lives on by intention."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not " ".join(process.cmdline()).endswith("[mux]"):
                found.append(process)
    return found


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
