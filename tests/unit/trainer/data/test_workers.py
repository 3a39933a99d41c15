"""Workers do not outlive the process that started them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from bitfleet.trainer.data.workers import run_jobs

REPOSITORY = Path(__file__).parents[4]


def say_who_works(folder: str) -> None:
    """A job: leave a file that is named after the worker."""
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(0.1)


def work(folder: str) -> None:
    """More than a test waits for."""
    run_jobs(say_who_works, [folder] * 10_000, [1] * 10_000, num_workers=2, title="jobs")


def is_running(pid: int) -> bool:
    """A process that has ended and that nobody has waited for does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_of_a_killed_process_end(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import work\nwork({str(tmp_path)!r})"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([f"{REPOSITORY}/src", str(REPOSITORY), *sys.path])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    workers = [int(path.name) for path in tmp_path.iterdir()]
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
