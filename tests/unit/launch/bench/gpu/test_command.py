"""`bitfleet bench gpu` starts its parts; one that fails, hangs or has no time left is a result."""

import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

from bitfleet.launch.bench.command import PartName, bench
from bitfleet.launch.bench.gpu import command as bench_gpu
from bitfleet.launch.bench.gpu.command import PARTS, TESTS_FOLDER, count_tests, run_part
from bitfleet.launch.bench.results import Row, Session, read_rows


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("update", str(tmp_path / "out.jsonl"), time.monotonic() + 60)


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Stand in for a part."""
    monkeypatch.setattr(bench_gpu, "_CHILD", (sys.executable, "-c", code))


def test_a_part_writes_its_results(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    child(
        monkeypatch,
        "import json, sys; told = json.loads(sys.argv[1]); print('noise');"
        "open(told['output'], 'a').write(json.dumps({'part': told['part'], 'what': 'bits', 'equal': True}) + '\\n')",
    )
    text = run_part(session)
    assert read_rows(Path(session.output)) == [{"part": "update", "what": "bits", "equal": True}]
    assert Path(session.output).with_suffix(".log").read_text() == "== update\nnoise\n"
    assert [line.split() for line in text.splitlines()[-2:]] == [["equal"], ["bits", "yes"]]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys; print('all is lost', file=sys.stderr); sys.exit(3)", "exit code 3"),
        ("import os; print('all is lost', flush=True); os.kill(os.getpid(), 11)", "ended by signal 11"),
    ],
)
def test_a_part_that_fails_is_a_result(
    code: str, error: str, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, code)
    run_part(session)
    (row,) = read_rows(Path(session.output))
    assert (row["error"], row["where"]) == (error, "== update\nall is lost")


def test_a_part_that_hangs_is_ended_with_its_workers(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child(
        monkeypatch,
        "import subprocess, sys, time\nworker = subprocess.Popen([sys.executable, '-c', 'import time; "
        f"time.sleep(60)'])\nopen({str(tmp_path / 'worker')!r}, 'w').write(str(worker.pid))\ntime.sleep(60)",
    )
    monkeypatch.setitem(PARTS, "update", PARTS["update"]._replace(most_seconds=4.0))
    run_part(session)
    (row,) = read_rows(Path(session.output))
    assert row["error"] == "not done after 4 s, ended"
    state = Path("/proc") / (tmp_path / "worker").read_text() / "stat"
    for _ in range(300):  # on a busy machine a killed process takes a moment to end
        if has_ended := not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    assert has_ended


@pytest.mark.parametrize(
    ("summary", "figures"),
    [
        ("35 passed in 5.20s", {"failed": 0, "passed": 35}),
        ("2 failed, 3 passed, 1 skipped, 2 errors in 5.20s", {"failed": 4, "passed": 3}),
        ("6 skipped in 5.20s", {"skipped": "6 skipped in 5.20s"}),
    ],
)
def test_tests_that_failed_are_counted(summary: str, figures: Row) -> None:
    assert count_tests(summary) == figures


def test_a_test_that_fails_is_a_result(session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tests = "import pytest\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
    (tmp_path / "test_rule.py").write_text(tests)
    monkeypatch.setattr(bench_gpu, "TESTS_FOLDER", tmp_path)
    run_part(dataclasses.replace(session, part="rule"))
    counts, error = read_rows(Path(session.output))
    assert counts == {"part": "rule", "what": "tests", "failed": 1, "passed": 1}
    assert error["error"] == "exit code 1"
    assert "test_rule.py::test_b" in error["where"]


def test_tests_select_tests_that_exist() -> None:
    for part in PARTS.values():
        if part.module.startswith("test_"):
            names = re.findall(r"def test_(\w+)\(", (TESTS_FOLDER / part.module).read_text())
            for word in filter(None, part.tests.split(" or ")):
                assert [name for name in names if word in name], word


def test_a_part_without_time_is_skipped(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "raise SystemExit(3)")
    run_part(dataclasses.replace(session, part="cifar", deadline=time.monotonic() + 30))
    (row,) = read_rows(Path(session.output))
    assert row["part"] == "cifar"
    assert re.fullmatch(r"60 s needed, (29|30) s left", row["skipped"])


def test_every_part_can_be_named() -> None:
    assert tuple(PARTS) == get_args(PartName)


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="bench gpu .*--steps"):
        bench(["gpu", "--steps", "3"])
    with pytest.raises(ValueError, match="'speed'.*'probe', 'rule'"):
        bench(["gpu", "--only", "rule", "speed"])
    with pytest.raises(ValueError, match="--cifar nowhere"):
        bench(["gpu", "--tiny", "--cifar", "nowhere"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="CUDA device.*--tiny"):
        bench(["gpu"])
    (tmp_path / "out.jsonl").write_text("")
    with pytest.raises(ValueError, match="--output .*out.jsonl exists"):
        bench(["gpu", "--tiny", "--output", str(tmp_path / "out.jsonl")])
