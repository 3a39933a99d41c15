"""The tests and the benchmark of a GPU, dry-run on the CPU at tiny sizes: on a device they fail for
no silly reason."""

import re
import sys
from pathlib import Path

import pytest

from bitfleet.launch.bench.gpu.command import PARTS
from bitfleet.launch.bench.results import Row, read_rows
from tests.conftest import run_command


def dry_run_tests(monkeypatch: pytest.MonkeyPatch, expression: str) -> int:
    """Run the chosen tests of tests/gpu; returns how many passed."""
    monkeypatch.setenv("BITFLEET_GPU_DRY_RUN", "1")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "-k",
        expression,
        "tests/gpu",
    ]
    done = run_command(command, timeout=900)
    assert done.returncode == 0, done.stdout
    return int(re.findall(r"(\d+) passed", done.stdout)[-1])


def test_tests_of_a_gpu_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dry_run_tests(monkeypatch, "not stopped_and_repeated") >= 50


@pytest.mark.slow
def test_the_resume_of_a_gpu_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dry_run_tests(monkeypatch, "stopped_and_repeated") == 1


def test_without_a_gpu_they_are_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITFLEET_GPU_DRY_RUN", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_command(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu/test_rule.py"]
    )
    assert done.returncode == 0, done.stdout
    assert "torch finds no CUDA device (BITFLEET_GPU_DRY_RUN=1 runs this on the CPU)" in done.stdout
    assert "passed" not in done.stdout


def missing(folder: Path, *modules: str) -> str:
    """A folder for PYTHONPATH in which `modules` cannot be imported."""
    folder.mkdir()
    for module in modules:
        (folder / f"{module}.py").write_text(f"raise ImportError('{module} is not installed here')\n")
    return str(folder)


def dry_run_bench(path: str, output: Path, *arguments: str) -> tuple[list[Row], str]:
    """Run `bench gpu --tiny` with the folder `path` in front of all modules; returns the results
    and what was printed."""
    code = f"import sys; sys.path.insert(0, {path!r}); from bitfleet.launch.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "gpu", "--tiny", "--seconds", "800", "--output", str(output)]
    done = run_command([*command, *arguments], timeout=900)
    assert done.returncode == 0, done.stdout
    return read_rows(output), done.stdout


def test_parts_need_no_more_than_they_use(tmp_path: Path) -> None:
    """On a bare machine: torch, timm, tyro, pydantic and pytest."""
    path = missing(tmp_path / "bare", "deepspeed", "psutil", "tensorboard", "h5py", "scipy", "matplotlib", "jinja2")
    rows, printed = dry_run_bench(path, tmp_path / "out.jsonl", "--only", "probe", "rule", "update")
    assert [row for row in rows if "error" in row] == []
    assert {row["part"] for row in rows} == {"probe", "rule", "update"}
    assert "update rules: tests with other flips" in printed
    assert printed.count(" met\n") == 1


@pytest.mark.slow
def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    path = missing(tmp_path / "bare", "h5py", "scipy", "matplotlib", "jinja2")
    rows, printed = dry_run_bench(path, tmp_path / "out.jsonl")
    assert [row for row in rows if "error" in row] == []
    assert {row["part"] for row in rows if "skipped" not in row} == set(PARTS)
    assert sum(row["what"] == "epoch" for row in rows) == 2
    assert [line.split()[1].rstrip(":") for line in printed.splitlines() if line.startswith("== ")] == [
        *PARTS,
        "targets",
    ]
