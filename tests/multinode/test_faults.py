"""Hosts that die, cables that are cut, hosts that differ: one clear message, nothing left, and a
run that continues."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitfleet.trainer.checkpoint.format import checkpoints, step_of
from bitfleet.trainer.ranks.exit_codes import REQUEUE
from tests.conftest import REPOSITORY
from tests.integration.runs import assert_same_bits, final_tensors, metrics
from tests.multinode.host_job import HostJob
from tests.multinode.lab import Lab

pytestmark = pytest.mark.multinode
A, B = "host-a", "host-b"
SLOWLY = {"BITFLEET_STEP_SECONDS": "0.3"}


def assert_same_run(one_host: Path, run: Path) -> None:
    assert_same_bits(final_tensors(one_host), final_tensors(run))
    assert metrics(one_host) == metrics(run)


def test_two_hosts_are_one_host(two_hosts: Lab, one_host: Path, options: list[str], tmp_path: Path) -> None:
    """Run 2 hosts x 2 ranks through pdsh and ssh over a cable of 20 Mbit/s: slower, but the same
    bits."""
    two_hosts.throttle(B, "20mbit")
    try:
        job = HostJob(two_hosts, 2, [*options, "--run_dir", tmp_path / "run"])
        assert job.wait() == 0, job.output
    finally:
        two_hosts.throttle(B, None)
    print(f"{time.monotonic() - job.started_at:.1f} s")
    assert "on 4 ranks" in job.output
    assert two_hosts.sent_bytes(B) > 1e6
    assert_same_run(one_host, tmp_path / "run")


def test_four_hosts_are_one_host(four_hosts: Lab, one_host: Path, options: list[str], tmp_path: Path) -> None:
    job = HostJob(four_hosts, 1, [*options, "--run_dir", tmp_path / "run"])
    assert job.wait() == 0, job.output
    print(f"{time.monotonic() - job.started_at:.1f} s")
    assert_same_run(one_host, tmp_path / "run")


def kill_host(hosts: Lab) -> None:
    hosts.kill(B)


def cut_cable(hosts: Lab) -> None:
    hosts.cable(B, "down")


def signal_rank(hosts: Lab) -> None:
    (rank,) = hosts.processes(B, f"{HostJob.SCRIPT}\0--local_rank=0")[-1:]
    os.kill(rank, signal.SIGUSR1)


def end_ssh(hosts: Lab) -> None:
    """Kill the ssh session that started the ranks of a host, not the server, its oldest sshd."""
    for pid in hosts.processes(B, "sshd")[1:]:
        os.kill(pid, signal.SIGKILL)


def test_a_run_goes_on_after_every_fault(two_hosts: Lab, one_host: Path, options: list[str], tmp_path: Path) -> None:
    """Interrupt one run by a killed host, a cut cable, a signal to one rank and a lost ssh
    session."""
    run = tmp_path / "run"
    faults: list[tuple[Callable[[Lab], None], str]] = [
        (kill_host, "lost the host host-b (rank 1) in step "),
        (cut_cable, "lost the host host-b (rank 1) in step "),
        (end_ssh, ""),
        (signal_rank, ""),
    ]
    for fault, sentence in faults:
        before = step_of(checkpoints(run)[-1]) if run.exists() else 0
        job = HostJob(two_hosts, 1, [*options, "--run_dir", run], environment=SLOWLY)
        job.wait_for_step(before + 5)
        print(f"{fault.__name__} after {time.monotonic() - job.started_at:.1f} s")
        fault(two_hosts)
        since = time.monotonic()
        code = job.ends_everywhere(since, *([A] if fault is kill_host else [A, B]))
        assert code != 0, job.output
        assert len(job.errors) == bool(sentence), job.output
        assert sentence in "".join(job.errors)
        if fault is kill_host:
            two_hosts.start(B)
        elif fault is cut_cable:
            two_hosts.cable(B, "up")
        elif fault is signal_rank:
            assert code == REQUEUE, job.output
            assert "stopped by SIGUSR1" in job.output
        else:
            assert "stopped by the end of the launcher" in job.output
        assert step_of(checkpoints(run)[-1]) > before
    job = HostJob(two_hosts, 1, [*options, "--run_dir", run])
    assert job.wait() == 0, job.output
    assert_same_run(one_host, run)


def another_checkout(folder: Path, file: str, old: str, new: str) -> dict[Path, Path]:
    """Copy this project for another host, with `new` for `old` in one file; .venv is shared."""
    room = Path(file).parts[0]
    copy = shutil.copytree(REPOSITORY / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    return {REPOSITORY / room: copy}


def another_version(folder: Path, _: Path) -> dict[Path, Path]:
    return another_checkout(folder, "trainer/run/stop.py", "FILE_SECONDS = 1.0", "FILE_SECONDS = 2.0")


def another_config(folder: Path, _: Path) -> dict[Path, Path]:
    return another_checkout(folder, "configs/fashion_quickstart.py", "linear(2.5e-3, 5e-6)", "linear(2.5e-3, 6e-6)")


def broken_config(folder: Path, _: Path) -> dict[Path, Path]:
    return another_checkout(folder, "configs/fashion_quickstart.py", "epochs=24", "epochs=0")


def other_data(folder: Path, images: Path) -> dict[Path, Path]:
    copy = shutil.copytree(images, folder / "images")
    (copy / "train" / "class2" / "0007.png").unlink()
    return {images: copy}


def no_data(folder: Path, images: Path) -> dict[Path, Path]:
    (folder / "nothing").mkdir()
    return {images: folder / "nothing"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (another_version, r"rank 1 on host-b differs from rank 0 on host-a in the source file trainer/run/stop.py: "),
        (
            another_config,
            r"rank 1 on host-b differs from rank 0 on host-a in the field optim.lr.end: 6e-06 there, 5e-06 on",
        ),
        (broken_config, r"(rank 1 on host-b): epochs must be at least 1, not 0"),
        (other_data, r"rank 1 on host-b differs from rank 0 on host-a in the lists of images in "),
        (no_data, r"(rank 1 on host-b): "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_host_that_differs_ends_the_job(
    make: Callable[[Path, Path], dict[Path, Path]],
    sentence: str,
    two_hosts: Lab,
    options: list[str],
    tiny_images: Path,
    tmp_path: Path,
) -> None:
    two_hosts.stop(B)
    two_hosts.start(B, make(tmp_path, tiny_images))
    try:
        job = HostJob(two_hosts, 1, [*options, "--run_dir", tmp_path / "run"])
        code = job.ends_everywhere(job.wait_for_error(), A, B)
    finally:
        two_hosts.stop(B)
        two_hosts.start(B)
    assert code == 2, job.output
    assert len(job.errors) == 1, job.output
    assert sentence in job.errors[0]
    assert "Traceback" not in job.output
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_rank_ends_all(two_hosts: Lab, options: list[str], tmp_path: Path) -> None:
    fault = json.dumps({"rank": 1, "point": "backward", "step": 4, "action": "raise"})
    job = HostJob(two_hosts, 1, [*options, "--run_dir", tmp_path / "run"], environment={"BITFLEET_FAULT": fault})
    assert job.wait() == 1, job.output
    failed_at = float((two_hosts.folder / "progress.fault").read_text())
    assert job.ends_everywhere(failed_at, A, B) == 1
    (line,) = job.errors
    assert "(rank 1 on host-b): RuntimeError: an error that nobody expects" in line


def test_a_host_that_does_not_come_is_named(two_hosts: Lab, options: list[str], tmp_path: Path) -> None:
    more = ["--run_dir", tmp_path / "run", "--engine.collective_timeout_minutes", "0.1"]
    two_hosts.cable(B, "down")
    try:
        job = HostJob(two_hosts, 1, [*options, *more])
        code = job.ends_everywhere(job.wait_for_error(), A, B)
    finally:
        two_hosts.cable(B, "up")
    assert code != 0, job.output
    (line,) = job.errors
    assert re.search(r"rank 1 of 2 .*10.77.0.1:29500 .*6 s .*rank 0 on host-a", line)
