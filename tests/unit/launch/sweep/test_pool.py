import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bitfleet.launch import processes
from bitfleet.launch.sweep.pool import Ended, Job, run_jobs


def shell(tmp_path: Path, name: str, script: str) -> Job:
    return Job(name, ("sh", "-c", script), tmp_path / f"{name}.log")


def is_running(pid: int) -> bool:
    """Return True if the process exists and is not a zombie; it may end between the two looks."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)


def test_two_places_and_one_more_attempt(tmp_path: Path) -> None:
    """ "b" fails the first time: it comes back behind "c", and its log keeps both attempts; "a" has
    its place all the time."""
    jobs = [
        shell(tmp_path, "a", "while ! test -e b3; do sleep 0.01; done; echo $PLACE"),
        shell(tmp_path, "b", "echo $PLACE; test -e b2 && touch b3 || { touch b2; exit 3; }"),
    ]
    jobs = [job._replace(command=("sh", "-c", f"cd {tmp_path}; {job.command[2]}")) for job in jobs]
    seen: list[Ended] = []

    def ended(each: Ended) -> bool:
        seen.append(each)
        return each.code == 3

    assert run_jobs([*jobs, shell(tmp_path, "c", "true")], [{"PLACE": "p"}, {"PLACE": "q"}], ended) is False
    assert [(each.job.name, each.code) for each in seen if each.job.name != "a"] == [("b", 3), ("c", 0), ("b", 0)]
    assert not any(each.stopped for each in seen)
    (first,) = [each for each in seen if each.job.name == "a"]
    assert first.output == "p\n"
    assert seen[-1].output in ("p\n", "q\n") or seen[-1].job.name == "a"
    assert len((tmp_path / "b.log").read_text().split()) == 2


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """SIGINT is heard, also where the tests run in the background of a shell, which has it
    ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_request_stops_what_runs_and_starts_nothing_more(number: signal.Signals, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    saves = shell(tmp_path, "saves", f"trap 'echo saved; exit 75' TERM; touch {ready}; while :; do sleep 0.05; done")
    seen: list[Ended] = []

    def ended(each: Ended) -> bool:
        seen.append(each)
        return False

    def ask() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    asking = threading.Thread(target=ask)
    asking.start()
    assert run_jobs([saves, shell(tmp_path, "later", "true")], [{}], ended) is True
    asking.join()
    assert [(each.job.name, each.code, each.stopped, each.output) for each in seen] == [("saves", 75, True, "saved\n")]
    assert signal.getsignal(number) == before


def test_second_interrupt_kills(tmp_path: Path) -> None:
    """Two that come before Python has looked at the first are one, so the second waits until the
    first has gone on."""
    ready, asked = tmp_path / "ready", tmp_path / "asked"
    deaf = shell(tmp_path, "deaf", f"trap 'touch {asked}' TERM; touch {ready}; while :; do sleep 0.05; done")
    seen: list[int] = []

    def ask() -> None:
        for there in (ready, asked):
            while not there.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=ask)
    asking.start()
    assert run_jobs([deaf], [{}], lambda each: bool(seen.append(each.code))) is True
    asking.join()
    assert seen == [-signal.SIGKILL]


def test_nobody_outlives_a_killed_pool(tmp_path: Path) -> None:
    """The kernel asks them to stop, as the pool would have."""
    loop = f"echo $$ > {tmp_path}/tmp; mv {tmp_path}/tmp {tmp_path}/pid; while :; do sleep 0.05; done"
    script = f"trap 'echo saved; exit 75' TERM; {loop}"
    code = (
        "from pathlib import Path; from bitfleet.launch.sweep.pool import *\n"
        f"run_jobs([Job('x', ('sh', '-c', {script!r}), Path({str(tmp_path / 'log')!r}))], [{{}}], lambda ended: False)"
    )
    pool = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    pid = tmp_path / "pid"
    give_up = time.monotonic() + 60
    while not pid.exists() and time.monotonic() < give_up:
        time.sleep(0.02)
    pool.kill()
    pool.wait()
    number = int(pid.read_text())
    while is_running(number):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    assert (tmp_path / "log").read_text() == "saved\n"
