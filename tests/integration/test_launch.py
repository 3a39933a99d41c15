"""`bitfleet launch deepspeed` with real processes: signals, killed launchers, exit codes, and two
hosts behind pdsh."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bitfleet.launch.cluster.supervise import AGENT
from bitfleet.trainer.checkpoint.format import checkpoints, latest_checkpoint, step_of, verify
from bitfleet.trainer.ranks.exit_codes import REQUEUE
from tests.conftest import BIN, HANGS, REPOSITORY, free_port

LONG = ["--epochs", "400", "--checkpoint.every_epochs", "400"]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tiny: list[str], tmp_path: Path) -> Iterator[Start]:
    """Start a run in tmp_path/run; at the end all processes with that folder on their command line
    are killed."""
    run = str(tmp_path / "run")

    def launch(*where: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BIN / "bitfleet", "launch", "deepspeed", *where, *tiny, *LONG, "--run_dir", run],
            cwd=REPOSITORY,
            env=os.environ
            | {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}", "PATH": f"{BIN}:{os.environ['PATH']}"}
            | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    yield launch
    for process in of_run(run):
        with contextlib.suppress(psutil.Error):
            process.kill()


def of_run(run: Path | str) -> list[psutil.Process]:
    """Return the launchers, ranks and workers of a run: processes with its folder on their command
    line."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def wait_until_it_trains(run: Path, job: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + HANGS
    while not (run / "metrics.jsonl").exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < give_up
        time.sleep(0.05)


def agents(run: Path) -> list[psutil.Process]:
    return [process for process in of_run(run) if AGENT in process.cmdline()]


def ended(job: subprocess.Popen[str], run: Path, timeout: float = HANGS) -> tuple[int, str]:
    """Wait for the end of a job; return exit code and output. No process of it may be left."""
    output, _ = job.communicate(timeout=timeout)
    left = [process.cmdline() for process in of_run(run)]
    assert not left, output
    return job.returncode, output


def saved(run: Path) -> bool:
    newest = latest_checkpoint(run)
    return newest is not None and step_of(newest) > 0 and bool(verify(checkpoints(run)[-1]))


def test_signal_reaches_all_ranks_and_the_code_is_75(start: Start, tmp_path: Path) -> None:
    job = start("--gpus", "2")
    wait_until_it_trains(tmp_path / "run", job)
    job.send_signal(signal.SIGTERM)
    code, output = ended(job, tmp_path / "run")
    assert code == REQUEUE, output
    assert "stopped by SIGTERM after step" in output
    assert saved(tmp_path / "run")


@pytest.mark.parametrize("victim", ["agent", pytest.param("command", marks=pytest.mark.slow)])
def test_killed_launcher_is_no_success_and_leaves_nobody(victim: str, start: Start, tmp_path: Path) -> None:
    """DeepSpeed's command returns 0 when its agent is killed, and leaves the ranks behind when
    itself is."""
    job = start("--gpus", "2")
    wait_until_it_trains(tmp_path / "run", job)
    (agent,) = agents(tmp_path / "run")
    command = agent.parent()
    assert command is not None
    (agent if victim == "agent" else command).kill()
    code, output = ended(job, tmp_path / "run")
    assert code == REQUEUE, output
    assert "stopped by the end of the launcher" in output
    assert saved(tmp_path / "run")


@pytest.mark.slow
def test_killed_rank_is_an_error(start: Start, tmp_path: Path) -> None:
    job = start("--gpus", "2")
    wait_until_it_trains(tmp_path / "run", job)
    (agent,) = agents(tmp_path / "run")
    agent.children()[1].kill()
    code, output = ended(job, tmp_path / "run")
    assert code not in (0, REQUEUE), output


@pytest.mark.slow
def test_death_of_bitfleet_launch_stops_the_ranks(start: Start, tmp_path: Path) -> None:
    job = start("--gpus", "2")
    wait_until_it_trains(tmp_path / "run", job)
    job.kill()
    job.communicate(timeout=HANGS)  # its output ends with the last rank
    give_up = time.monotonic() + 10
    while of_run(tmp_path / "run"):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert saved(tmp_path / "run")


@pytest.mark.slow
def test_second_interrupt_kills(start: Start, tmp_path: Path) -> None:
    job = start("--gpus", "2")
    wait_until_it_trains(tmp_path / "run", job)
    for rank in agents(tmp_path / "run")[0].children():
        rank.suspend()  # so that it cannot answer the first one
    job.send_signal(signal.SIGINT)
    time.sleep(1)
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    code, output = ended(job, tmp_path / "run", timeout=20)
    assert code == 130, output


@pytest.mark.slow
def test_two_nodes_without_ssh(start: Start, tmp_path: Path) -> None:
    """Start each node's own command, both on one machine; one of them gets a signal to stop."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    where = ["--hostfile", str(hosts), "--no_ssh", "--master_port", str(free_port())]
    jobs = [start(*where, "--node_rank", str(node)) for node in range(2)]
    wait_until_it_trains(tmp_path / "run", jobs[0])
    jobs[1].send_signal(signal.SIGUSR1)
    outputs = [job.communicate(timeout=HANGS)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [REQUEUE, REQUEUE], outputs
    assert "stopped by SIGUSR1" in outputs[0]
    assert not of_run(tmp_path / "run")


FAKE_SSH = """#!/usr/bin/env bash
# Every host is this one.
while [[ $1 == -* ]]; do case $1 in -o|-l|-p) shift 2 ;; *) shift ;; esac; done
shift
exec bash -c "$*"
"""


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, str]:
    """Variables with an ssh for which every host is this machine."""
    if shutil.which("pdsh") is None:
        pytest.skip("SKIPPED: pdsh is not installed")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(FAKE_SSH)
    (folder / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("alpha slots=1\nbeta slots=1\n")
    return {"PATH": f"{folder}:{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_stop_through_pdsh(start: Start, tmp_path: Path, ssh: dict[str, str]) -> None:
    job = start(
        "--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1", "--master_port", str(free_port()), **ssh
    )
    wait_until_it_trains(tmp_path / "run", job)
    job.send_signal(signal.SIGTERM)
    code, output = ended(job, tmp_path / "run")
    assert code == REQUEUE, output
    assert "stopped by the file STOP" in output
    assert "environment that travels: BITFLEET_CACHE OMP_NUM_THREADS" in output
    assert saved(tmp_path / "run")
    assert not (tmp_path / "run" / "STOP").exists()


@pytest.mark.slow
def test_death_of_pdsh_ends_the_ranks_on_every_host(start: Start, tmp_path: Path, ssh: dict[str, str]) -> None:
    """The standard input of the ranks, which comes from the launching machine, ends."""
    job = start(
        "--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1", "--master_port", str(free_port()), **ssh
    )
    wait_until_it_trains(tmp_path / "run", job)
    (pdsh,) = [process for process in of_run(tmp_path / "run") if process.cmdline()[0] == "pdsh"]
    pdsh.kill()
    code, output = ended(job, tmp_path / "run")
    assert code == REQUEUE, output
    assert saved(tmp_path / "run")
