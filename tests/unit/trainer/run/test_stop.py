"""Requests to stop, and the lock of a run folder."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.run import files as run_lock
from bitfleet.trainer.run import stop
from bitfleet.trainer.run.files import lock_run
from bitfleet.trainer.run.stop import StopWatcher, launcher_processes

pytestmark = pytest.mark.usefixtures("process_group")
ALONE = Ranks(0, 1, 0, 1)


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_signal_is_a_request(number: signal.Signals, tmp_path: Path) -> None:
    before = [signal.getsignal(each) for each in stop.SIGNALS]
    with StopWatcher(tmp_path, ALONE, launched=False) as watcher:
        assert watcher.agree() == ("", False)
        os.kill(os.getpid(), number)
        assert watcher.agree(True) == (number.name, True)
        assert watcher.seen_at is not None
    assert [signal.getsignal(each) for each in stop.SIGNALS] == before


def test_second_interrupt_is_immediate(tmp_path: Path) -> None:
    with StopWatcher(tmp_path, ALONE, launched=False), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_file_is_a_request_once(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()  # left over
    with StopWatcher(tmp_path, ALONE, launched=False) as watcher:
        assert watcher.agree() == ("", False)
        (tmp_path / "STOP").touch()
        watcher._looked_at -= stop.FILE_SECONDS
        assert watcher.agree() == ("the file STOP", False)
    assert not (tmp_path / "STOP").exists()


class Clock:
    """Seconds that pass as a test says, and what two ranks give to an all-reduce."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.asked, self.others = 0.0, [], [0, 0, -stop.MAX_STEPS]
        monkeypatch.setattr(stop.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(stop, "all_reduce_max", self.reduce)

    def reduce(self, values: list[int]) -> list[int]:
        self.asked.append(list(values))
        return [max(pair) for pair in zip(values, self.others, strict=True)]


def test_ranks_agree_every_quarter_of_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with StopWatcher(tmp_path, Ranks(0, 2, 0, 2), launched=False) as watcher:

        def intervals(num_steps: int, seconds: float) -> list[int]:
            """Steps after which the ranks agree."""
            found = []
            for step in range(1, num_steps + 1):
                clock.now += seconds
                before = len(clock.asked)
                assert watcher.after_step() == ("", False)
                found += [step] if len(clock.asked) > before else []
            return found

        assert intervals(3, 2.0) == [1, 2, 3]
        assert intervals(16, 0.05) == [1, 6, 11, 16]
        *_, before, last = intervals(1000, 1e-4)
        assert last - before == stop.MAX_STEPS
        clock.others = [0, 0, -3]  # a rank that is slower than this one
        *_, before, last = intervals(310, 1e-4)
        assert last - before == 3


def test_request_of_another_rank_is_heard_after_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.others = [0, 0, -4]
    with StopWatcher(tmp_path, Ranks(0, 2, 0, 2), launched=False) as watcher:
        assert watcher.after_step() == ("", False)  # four steps until the next time
        clock.others = [1, 1, -4]
        assert [watcher.after_step(True) for _ in range(3)] == [("", False)] * 3
        assert watcher.after_step() == ("SIGTERM", True)
        assert watcher.agree() == ("SIGTERM", True)  # in a validation each time
    assert len(clock.asked) == 3


def test_one_rank_alone_looks_after_each_step(tmp_path: Path) -> None:
    with StopWatcher(tmp_path, ALONE, launched=False) as watcher:
        for _ in range(5):
            assert watcher.after_step(True) == ("", True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watcher.after_step() == ("SIGTERM", False)


def test_launcher_that_dies_is_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StopWatcher(tmp_path, ALONE, launched=True) as watcher:
        assert watcher.agree() == ("", False)
        monkeypatch.setattr(os, "getppid", os.getpid)  # never its own parent; the real one may be 1
        assert watcher.agree()[0] == "the end of the launcher"
    with StopWatcher(tmp_path, ALONE, launched=False) as watcher:
        assert watcher.agree() == ("", False)


def test_deepspeeds_command_is_watched_behind_its_agent(tmp_path: Path) -> None:
    """A process whose parent's command line has DeepSpeed's agent in it sees the parent of that as
    well."""
    child = "from bitfleet.trainer.run.stop import launcher_processes; print(*launcher_processes())"
    parent = (
        f"import os, subprocess, sys; print(os.getpid(), flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    script = tmp_path / "deepspeed.launcher.launch"
    script.write_text(parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=True)
    agent, *seen = done.stdout.split()
    assert seen == [agent, str(os.getpid())]
    assert launcher_processes() == (os.getppid(),)


def test_end_of_the_input_is_the_end_of_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank behind ssh sees the end of its input when the launching machine is gone; an input that
    ended before says nothing."""
    monkeypatch.setattr(stop, "launcher_processes", lambda: (1, 2))
    saved = os.dup(0)
    try:
        for kind in (os.pipe, lambda: [end.detach() for end in socket.socketpair()]):
            reader, writer = kind()
            os.dup2(reader, 0)
            os.close(reader)
            with StopWatcher(tmp_path, ALONE, launched=True) as watcher:
                assert watcher.agree() == ("", False)
                os.write(writer, b"is not read")
                assert watcher.agree() == ("", False)
                os.close(writer)
                assert watcher.agree()[0] == "the end of the launcher"
            assert stop.input_from_launcher() is None
        os.dup2(null := os.open(os.devnull, os.O_RDONLY), 0)
        os.close(null)
        assert stop.input_from_launcher() is None
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def test_folder_has_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.3)
    file = lock_run(tmp_path / "run")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        lock_run(tmp_path / "run")
    file.close()
    lock_run(tmp_path / "run").close()


@pytest.mark.parametrize(
    ("place", "reason"), [("/proc/xx", "No such file or directory"), ("file", "File exists"), ("file/x", "Not a dir")]
)
def test_folder_that_cannot_be_written_is_one_sentence(place: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"{place} cannot be created or written \({reason}.*--run_dir or --output"):
        lock_run(tmp_path / place)
