"""How `bitfleet bench gpu` starts its parts and what becomes of one that fails, hangs or has no time left."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from bitfleet.launch.bench.command import USAGE, bench
from bitfleet.launch.bench.gpu import command as bench_gpu
from bitfleet.launch.bench.gpu.command import PARTS, Options, run_part
from bitfleet.launch.bench.gpu.rows import read_rows


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(str(tmp_path / "out.jsonl"), False, time.monotonic() + 60, None, None)


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """What runs instead of a part."""
    monkeypatch.setattr(bench_gpu, "_CHILD", (sys.executable, "-c", code))


def test_a_part_writes_its_results(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child(
        monkeypatch,
        "import json, sys; name, told = sys.argv[1:]; told = json.loads(told); print('noise');"
        "open(told['output'], 'a').write(json.dumps({'part': name, 'what': 'bits', 'equal': True}) + '\\n')",
    )
    run_part("rule", options)
    assert read_rows(Path(options.output)) == [{"part": "rule", "what": "bits", "equal": True}]
    assert Path(options.output).with_suffix(".log").read_text() == "== rule\nnoise\n"
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-2:]] == [["equal"], ["bits", "yes"]]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys; print('all is lost', file=sys.stderr); sys.exit(3)", "exit code 3"),
        ("import os; print('all is lost', flush=True); os.kill(os.getpid(), 11)", "ended by signal 11"),
    ],
)
def test_a_part_that_fails_is_a_result(
    code: str, error: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, code)
    run_part("rule", options)
    (row,) = read_rows(Path(options.output))
    assert (row["error"], row["where"]) == (error, "== rule\nall is lost")


def test_a_part_that_hangs_is_ended_with_its_workers(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child(
        monkeypatch,
        "import subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'worker')!r}, 'w').write(str(worker.pid))\n"
        "time.sleep(60)",
    )
    monkeypatch.setitem(PARTS, "rule", PARTS["rule"]._replace(most_seconds=4.0))
    run_part("rule", options)
    (row,) = read_rows(Path(options.output))
    assert row["error"] == "not done after 4 s, ended"
    state = Path("/proc") / (tmp_path / "worker").read_text() / "stat"
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_part_without_time_is_skipped(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "raise SystemExit(3)")
    run_part("cifar", options, seconds_for_later_parts=30.0)
    (row,) = read_rows(Path(options.output))
    assert row["part"] == "cifar"
    assert re.fullmatch(r"60 s needed, (29|30) s left", row["skipped"])


def test_usage_names_every_part() -> None:
    assert " ".join(PARTS) in " ".join(USAGE.split())


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="bench gpu has no option '--steps'"):
        bench(["gpu", "--steps", "3"])
    with pytest.raises(ValueError, match="bench gpu has no part 'speed'; there are: probe, rule, "):
        bench(["gpu", "--only", "rule", "speed"])
    with pytest.raises(ValueError, match="--cifar nowhere is not a folder; it should hold train/<class>/"):
        bench(["gpu", "--tiny", "--cifar", "nowhere"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no CUDA device here: --tiny is a dry run without one"):
        bench(["gpu"])
    (tmp_path / "out.jsonl").write_text("")
    with pytest.raises(ValueError, match="out.jsonl exists already; name a new file, or remove it"):
        bench(["gpu", "--tiny", "--output", str(tmp_path / "out.jsonl")])
