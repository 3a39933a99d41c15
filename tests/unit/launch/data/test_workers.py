"""The pool of processes: what happens to it when the process that started it is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import REPOSITORY

SLOW_JOBS = """
import os, sys, time
from pathlib import Path
from bitfleet.launch.data.workers import run_jobs
def job(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(0.1)
if __name__ == "__main__":
    run_jobs(job, [sys.argv[1]] * 3000, [1] * 3000, num_workers=2, title="slow")
"""


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait up to ten minutes: starting a worker imports torch, which takes a minute on a busy
    machine."""
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within ten minutes")


def test_workers_end_with_the_process_that_was_killed(tmp_path: Path) -> None:
    script, folder = tmp_path / "slow.py", tmp_path / "workers"
    script.write_text(SLOW_JOBS)
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}/src:{REPOSITORY}"}
    with subprocess.Popen([sys.executable, script, folder], env=environment, stderr=subprocess.DEVNULL) as parent:
        wait_for(lambda: len(list(folder.iterdir())) == 2)
        parent.kill()
    workers = [int(path.name) for path in folder.iterdir()]
    wait_for(lambda: not any(map(is_running, workers)))
