"""Start ranks under mpirun, by hand, and with the variables of srun (SLURM itself is not
needed)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import HANGS, finish, free_port, run_command, run_python, start_python
from tests.integration.runs import assert_same_bits, failed, final_tensors

STEPS = ["--stop_after_steps", "6", "--num_replicas", "2", "--num_threads", "1"]
MODULE = "bitfleet.launch.train"


def run_all(environments: Sequence[dict[str, str]], *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run the same module at once in several processes, each with its further variables."""
    jobs = [start_python("-m", *arguments, **variables) for variables in environments]
    return [finish(job, arguments, HANGS) for job in jobs]


def slurm(rank: int, **more: str) -> dict[str, str]:
    """Return the variables that srun --nodes=1 --ntasks=2 gives to a task."""
    words = (
        f"SLURM_JOB_ID={os.getpid()} SLURM_STEP_ID=0 SLURM_PROCID={rank} SLURM_LOCALID={rank} SLURM_NODEID=0 "
        "SLURM_NTASKS=2 SLURM_NNODES=1 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_STEP_TASKS_PER_NODE=2 "
        "SLURM_JOB_NODELIST=node7"
    )
    return dict(word.split("=", 1) for word in words.split()) | more


def test_srun_variables_make_a_job(tiny: list[str], tmp_path: Path) -> None:
    done = run_all([slurm(0), slurm(1)], MODULE, *tiny, *STEPS, "--run_dir", str(tmp_path / "run"))
    assert [rank.returncode for rank in done] == [0, 0], done[0].stdout
    assert "steps on 2 ranks (cpu, fp32)" in done[0].stdout
    assert "ranks" not in done[1].stdout
    alone = run_python("-m", MODULE, *tiny, *STEPS, "--run_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stdout
    assert_same_bits(final_tensors(tmp_path / "run", 6), final_tensors(tmp_path / "alone", 6))


def test_contradiction_is_one_sentence() -> None:
    first, second = run_all([slurm(rank, WORLD_SIZE="4") for rank in range(2)], "bitfleet.launch", "bench", "memory")
    failed(first, "WORLD_SIZE is 4", "2 (SLURM_STEP_NUM_TASKS)")
    assert "error (rank 1): WORLD_SIZE is 4" in second.stdout


@pytest.mark.slow
def test_mpirun(tiny: list[str], tmp_path: Path) -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("SKIPPED: mpirun is not installed (apt-get install openmpi-bin)")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = ["mpirun", *root, "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, "-m", MODULE]
    done = run_command([*command, *tiny, *STEPS, "--run_dir", tmp_path / "run"])
    assert done.returncode == 0, done.stdout
    assert "steps on 2 ranks (cpu, fp32)" in done.stdout


@pytest.mark.slow
def test_by_hand(tiny: list[str], tmp_path: Path) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    places = [place | {"RANK": str(rank)} for rank in range(2)]
    done = run_all(places, MODULE, *tiny, *STEPS, "--run_dir", str(tmp_path / "run"))
    assert [rank.returncode for rank in done] == [0, 0], done[0].stdout
    assert "steps on 2 ranks (cpu, fp32)" in done[0].stdout
