"""A sweep whose runs are shell scripts: what is kept, tried again and given up."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from bitfleet.launch.arguments import parse_train
from bitfleet.trainer import sweep_pool
from bitfleet.trainer.run_folder import write_config
from bitfleet.trainer.sweep import PlannedRun, Point, Sweep, plan_runs
from bitfleet.trainer.sweep_outcomes import read_outcomes, sentence_of
from bitfleet.trainer.sweep_pool import Ended, Job
from bitfleet.trainer.sweep_run import check_folders, run_sweep

SWEEP = Sweep("s", "T", "Q?", "fashion_small", tuple(Point({"run": name}, ()) for name in "abc"), (0,))
SAYS_WHY = "echo noise; echo 'bitfleet: error (rank 1): the loss is nan: lower it'; exit 2"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_pool, "LOOK_SECONDS", 0.01)


def planned(folder: Path, *options: str) -> list[PlannedRun]:
    return plan_runs(SWEEP, folder, options, 1, lambda words: parse_train(words, "t"))


def sweep_of(folder: Path, scripts: Sequence[str]) -> int:
    """Run a, b, c as the `scripts`; each leaves a line in the file "started"."""
    commands = {
        run.name: ("sh", "-c", f"echo {run.point.labels['run']} >> {folder}/started; {script}")
        for run, script in zip(planned(folder), scripts, strict=True)
    }
    folder.mkdir(exist_ok=True)
    (folder / "started").write_text("")
    return run_sweep(SWEEP, planned(folder), folder, lambda run: commands[run.name], [{}])


def started(folder: Path) -> str:
    return "".join((folder / "started").read_text().split())


def column(folder: Path, name: str) -> list[str]:
    with (folder / "sweep.csv").open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_failing_run_is_given_up_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_of(tmp_path, ["true", SAYS_WHY, "true"]) == 1
    assert started(tmp_path) == "abcb"
    assert column(tmp_path, "status") == ["finished", "failed", "finished"]
    assert column(tmp_path, "error") == ["", "the loss is nan: lower it", ""]
    told = capsys.readouterr().out
    assert "[3 of 3] run-b-seed0: FAILED: the loss is nan: lower it" in told
    assert "2 finished, 1 failed, 0 to be done" in told
    # Started again, it gets one attempt more, and nothing else is run.
    assert sweep_of(tmp_path, ["false", SAYS_WHY, "false"]) == 1
    assert started(tmp_path) == "b"
    assert read_outcomes(tmp_path)["run-b-seed0"].failures == 3
    assert sweep_of(tmp_path, ["false", "true", "false"]) == 0
    assert column(tmp_path, "status") == ["finished"] * 3
    assert column(tmp_path, "error") == [""] * 3
    assert sweep_of(tmp_path, ["false"] * 3) == 0
    assert started(tmp_path) == ""


def test_second_attempt_may_succeed(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, ["true", f"test -e {tmp_path}/x || {{ touch {tmp_path}/x; exit 1; }}", "true"]) == 0
    assert column(tmp_path, "status") == ["finished"] * 3


def test_run_that_was_stopped_by_others_is_left_for_the_next_time(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, ["true", "exit 75", "true"]) == 75
    assert started(tmp_path) == "abc"
    assert column(tmp_path, "status") == ["finished", "pending", "finished"]
    assert sweep_of(tmp_path, ["true"] * 3) == 0
    assert started(tmp_path) == "b"


def test_outcomes_of_other_seeds_are_kept(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, ["true"] * 3) == 0
    other = Sweep("s", "T", "Q?", "fashion_small", SWEEP.points, (7,))
    runs = plan_runs(other, tmp_path, [], 1, lambda words: parse_train(words, "t"))
    assert run_sweep(other, runs, tmp_path, lambda run: ("true",), [{}, {}]) == 0
    assert len(read_outcomes(tmp_path)) == 6


def test_folder_with_another_configuration_is_refused(tmp_path: Path) -> None:
    (run, *_) = planned(tmp_path)
    assert run.config.run_dir
    write_config(run.config.run_dir, run.config, {})
    check_folders([run])
    with pytest.raises(
        ValueError, match=r"run-a-seed0 holds a run whose epochs is 8, and this sweep wants 9: pass another"
    ):
        check_folders(planned(tmp_path, "--epochs", "9"))


@pytest.mark.parametrize(
    ("code", "output", "sentence"),
    [
        (1, "x\nbitfleet: error: one\nbitfleet: error: two\n", "two"),
        (-9, "step 5\n\n", "it was killed by SIGKILL; the last line of run.log is 'step 5'"),
        (4, "", "it left with exit code 4; the last line of run.log is 'missing'"),
    ],
)
def test_reason_of_a_failure(code: int, output: str, sentence: str) -> None:
    assert sentence_of(Ended(Job("run", (), Path("run.log")), code, 1.0, False, output)) == sentence
