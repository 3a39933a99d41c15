"""Stop a run on request (a signal, a file, or the death of the launcher), on all ranks after the
same step."""

import os
import select
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from bitfleet.trainer.ranks.collectives import Ranks, all_reduce_max

STOP_FILE = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = ("", "SIGTERM", "SIGINT", "SIGUSR1", f"the file {STOP_FILE}", "the end of the launcher")
FILE_SECONDS = 1.0
"""Seconds between two checks of the run folder, which may be on a network."""
AGREE_SECONDS = 0.25
"""Approximate seconds between exchanges of requests between the ranks."""
MAX_STEPS = 100
"""Largest number of steps between exchanges: the next steps may take longer than the measured
ones."""


class StopWatcher:
    """Notices requests to stop while it is entered; `after_step` and `agree` tell all ranks of a
    request that one has seen.

    A second SIGINT interrupts at once. Signal handlers are as before when it is left.

    Args:
        run: run folder; the file STOP in it is a request, and is removed.
        ranks: this process's place.
        launched: whether a launcher started this process: its end is a request too.
    """

    def __init__(self, run: Path, ranks: Ranks, *, launched: bool) -> None:
        self._file, self._ranks = run / STOP_FILE, ranks
        self._seen = 0
        self.seen_at: float | None = None
        """time.monotonic() when this rank saw or heard of a request."""
        self._looked_at = -FILE_SECONDS
        self._interval, self._steps_left = 1, 1
        self._agreed_at = time.monotonic()
        self._ancestors: Callable[[], tuple[int, ...]] = launcher_processes if launched else tuple
        self._launcher = self._ancestors()
        # On another machine, standard input is the ssh connection of the launching machine and ends
        # with it.
        self._input = input_from_launcher() if len(self._launcher) > 1 else None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopWatcher":
        if self._ranks.is_main:
            self._file.unlink(missing_ok=True)  # meant for an earlier part of the run
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._request(1 + SIGNALS.index(signal.Signals(number)))

    def _request(self, reason: int) -> None:
        if not self._seen:
            self._seen, self.seen_at = reason, time.monotonic()

    def _look(self) -> None:
        if (self._launcher and self._ancestors() != self._launcher) or (self._input and self._input.poll(0)):
            self._request(5)
        if self._ranks.is_main and time.monotonic() - self._looked_at >= FILE_SECONDS:
            self._looked_at = time.monotonic()
            if self._file.exists():
                self._request(4)
                self._file.unlink(missing_ok=True)

    def after_step(self, flag: bool = False) -> tuple[str, bool]:
        """Call `agree` every N steps, which take about AGREE_SECONDS; else return ("", False).
        Every rank calls this.

        On a GPU a step may take less time than the ranks need to agree. N is agreed on as well, so
        it is the same on every rank.
        """
        self._steps_left -= 1
        if self._steps_left > 0:
            return "", False
        now = time.monotonic()
        seconds = max(now - self._agreed_at, 1e-9) / self._interval
        self._agreed_at = now
        wanted = max(1, min(MAX_STEPS, int(AGREE_SECONDS / seconds))) if self._ranks.world_size > 1 else 1
        return self._agree(flag, wanted)

    def agree(self, flag: bool = False) -> tuple[str, bool]:
        """Return the request that any rank has seen ("" for none), and whether `flag` is true on
        any; every rank calls this."""
        return self._agree(flag, self._interval)

    def _agree(self, flag: bool, wanted: int) -> tuple[str, bool]:
        """Call `agree`, and agree on the fewest steps that a rank wants until the next time."""
        self._look()
        reason, any_flag, fewest = all_reduce_max([self._seen, int(flag), -wanted])
        self._interval = self._steps_left = -fewest
        if reason:
            self._request(reason)
        return REASONS[reason], bool(any_flag)


def launcher_processes() -> tuple[int, ...]:
    """Return the process that started this one, and, if that is DeepSpeed's agent, the command that
    started the agent.

    A child whose parent has died gets another parent, so the numbers change when a launcher dies.
    Linux only.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        if b"deepspeed.launcher.launch" not in command:
            return (parent,)
        status = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return (parent,)
    return (parent, int(status.rpartition(")")[2].split()[1]))


def input_from_launcher() -> "select.poll | None":
    """Return a poll for the end of standard input, without reading it; None if it is not a pipe or
    socket, or has ended."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return None
    watch = select.poll()
    watch.register(0, select.POLLRDHUP)  # and always POLLHUP, POLLERR
    return None if watch.poll(0) else watch
