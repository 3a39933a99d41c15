"""Start child processes that end with this one, listen for requests to stop, and end the
children."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Requests to stop."""
POLL_SECONDS = 0.2
"""Time between two looks at the children."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


@contextlib.contextmanager
def requests_to_stop() -> Iterator[list[signal.Signals]]:
    """Collect the `SIGNALS` that this process gets meanwhile; one that is ignored (nohup) stays
    ignored."""
    requests: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        requests.append(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wants_kill(requests: Sequence[signal.Signals]) -> bool:
    """Return True after a second SIGINT."""
    return requests.count(signal.SIGINT) > 1


def start(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    death_signal: signal.Signals,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` in its own session, so that what a terminal sends reaches this process only.

    Args:
        command: program and arguments.
        environ: its environment.
        death_signal: the kernel sends it to the child when this process dies, even by SIGKILL.
        output: file for stdout and stderr. None: those of this process.
    """
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def end_with_parent() -> None:
        _prctl(libc, _PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != parent:  # which died before that
            os.kill(os.getpid(), death_signal)

    return subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


def adopt_orphans() -> None:
    """Make this process the parent of all that its children leave behind (a Linux "child
    subreaper")."""
    _prctl(ctypes.CDLL(None, use_errno=True), _PR_SET_CHILD_SUBREAPER, 1)


def reap() -> None:
    """Discard the exit codes of children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Return the processes below `pid` (None: this one), without shared ssh connections
    (ControlPersist)."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if not " ".join(process.cmdline()).endswith("[mux]"):
                    found.append(process)
    return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill `processes`; those that have ended are skipped."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
