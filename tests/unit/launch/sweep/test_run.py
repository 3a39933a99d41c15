"""A sweep whose runs are shell scripts: what is kept, tried again and given up."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from bitfleet.configs.sweeps.sweep import PlannedRun, Point, Sweep, plan_runs
from bitfleet.launch import processes
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.sweep.pool import Ended, Job
from bitfleet.launch.sweep.run import check_folders, run_sweep, sentence_of
from bitfleet.launch.sweep.table import JSON, read_outcomes
from bitfleet.trainer.config import to_dict, with_precision
from bitfleet.trainer.run import files as run_lock
from bitfleet.trainer.run.files import lock_run
from bitfleet.trainer.run.folder import CONFIG, write_config

AXES = {"run": ("a", "b", "c")}
SWEEP = Sweep("s", "T", "Q?", "fashion_small", AXES, tuple(Point({"run": name}, ()) for name in "abc"), (0,))
DONE = "mkdir -p runs && cp -r made/$RUN runs"
SAYS_WHY = "echo noise; echo 'bitfleet: error (rank 1): the loss is nan: lower it'; exit 2"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)


def planned(folder: Path, *options: str) -> list[PlannedRun]:
    return plan_runs(SWEEP, folder, options, lambda words: parse_train(words, "t"))


def made(run: PlannedRun, top1: float = 0.5) -> Path:
    """Return a folder next to `run` with the files of a finished run."""
    place = run.path.parents[1] / "made" / run.name
    place.mkdir(parents=True, exist_ok=True)
    (place / CONFIG).write_text(json.dumps({"config": to_dict(run.config)}))
    line = {"kind": "validation", "step": 3, "loss": 1.0, "top1": top1, "top5": 1.0}
    (place / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return place


def command_of(run: PlannedRun, script: str = DONE) -> tuple[str, ...]:
    """Leaves its point's name in the file "started", and runs `script`."""
    folder = made(run).parents[1]
    return "sh", "-c", f"cd {folder}; RUN={run.name}; echo {run.point.labels['run']} >> started; {script}"


def sweep_of(folder: Path, scripts: Sequence[str]) -> int:
    """Run a, b, c as the `scripts`."""
    commands = {run.name: command_of(run, script) for run, script in zip(planned(folder), scripts, strict=True)}
    (folder / "started").write_text("")
    return run_sweep(SWEEP, planned(folder), folder, lambda run: commands[run.name], [{}])


def started(folder: Path) -> str:
    return "".join((folder / "started").read_text().split())


def column(folder: Path, name: str) -> list[str]:
    with (folder / "sweep.csv").open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_failing_run_is_given_up_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_of(tmp_path, [DONE, SAYS_WHY, DONE]) == 1
    assert started(tmp_path) == "abcb"
    assert column(tmp_path, "status") == ["finished", "failed", "finished"]
    assert column(tmp_path, "error") == ["", "the loss is nan: lower it", ""]
    told = capsys.readouterr().out
    assert f"3 to be done; what they print: {tmp_path / 'logs'}\n" in told
    assert "[3 of 3] run-b-seed0: FAILED: the loss is nan: lower it" in told
    assert "2 finished, 1 failed, 0 to be done" in told
    # Started again, it gets one attempt more, and nothing else is run.
    assert sweep_of(tmp_path, ["false", SAYS_WHY, "false"]) == 1
    assert "\n1 to be done; " in f"\n{capsys.readouterr().out}"
    assert started(tmp_path) == "b"
    assert read_outcomes(tmp_path)["run-b-seed0"].failures == 3
    assert sweep_of(tmp_path, ["false", DONE, "false"]) == 0
    assert column(tmp_path, "status") == ["finished"] * 3
    assert column(tmp_path, "error") == [""] * 3
    assert sweep_of(tmp_path, ["false"] * 3) == 0
    assert started(tmp_path) == ""


def test_second_attempt_may_succeed(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, [DONE, f"test -e x || {{ touch x; exit 1; }}; {DONE}", DONE]) == 0
    assert column(tmp_path, "status") == ["finished"] * 3


def test_run_that_was_stopped_by_others_is_left_for_the_next_time(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, [DONE, "exit 75", DONE]) == 75
    assert started(tmp_path) == "abc"
    assert column(tmp_path, "status") == ["finished", "pending", "finished"]
    assert sweep_of(tmp_path, [DONE] * 3) == 0
    assert started(tmp_path) == "b"


def test_run_that_fails_while_the_sweep_stops_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails = f"trap '{SAYS_WHY.replace(chr(39), chr(34))}' TERM; kill -TERM $PPID; while :; do sleep 0.05; done"
    assert sweep_of(tmp_path, [fails, DONE, DONE]) == 75
    assert started(tmp_path) == "a"
    assert column(tmp_path, "error") == ["the loss is nan: lower it", "", ""]
    assert "run-a-seed0: failed, will be tried again: the loss is nan: lower it" in capsys.readouterr().out
    assert sweep_of(tmp_path, [DONE] * 3) == 0
    assert column(tmp_path, "error") == [""] * 3


def with_seeds(folder: Path, *seeds: int, points: Sequence[Point] = SWEEP.points) -> int:
    """Run a, b, c with the `seeds`."""
    sweep = dataclasses.replace(SWEEP, seeds=seeds, points=tuple(points))
    runs = plan_runs(sweep, folder, [], lambda words: parse_train(words, "t"))
    return run_sweep(sweep, runs, folder, command_of, [{}, {}])


def test_rows_of_other_seeds_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_of(tmp_path, [DONE] * 3) == 0
    assert with_seeds(tmp_path, 7) == 0
    assert len(read_outcomes(tmp_path)) == 6
    assert column(tmp_path, "seed") == ["0"] * 3 + ["7"] * 3
    assert column(tmp_path, "end.top1") == ["0.5"] * 6
    assert json.loads((tmp_path / JSON).read_text())["seeds"] == [0, 7]
    assert capsys.readouterr().out.count("3 finished, 0 failed, 0 to be done") == 2  # of those that were asked for
    # A seed without a started run leaves no row; nor does a point that the sweep no longer has.
    shutil.rmtree(tmp_path / "runs")
    assert with_seeds(tmp_path, 8, points=SWEEP.points[:2]) == 0
    assert column(tmp_path, "seed") == ["8"] * 2


def test_earlier_seeds_of_another_configuration_are_refused(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, [DONE] * 3) == 0
    other = dataclasses.replace(SWEEP, seeds=(7,))
    runs = plan_runs(other, tmp_path, ["--epochs", "9"], lambda words: parse_train(words, "t"))
    with pytest.raises(ValueError, match=r"run-a-seed0 .*epochs .*8.* 9"):
        run_sweep(other, runs, tmp_path, command_of, [{}])


def test_finished_run_whose_folder_was_removed_is_run_again(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, [DONE] * 3) == 0
    shutil.rmtree(tmp_path / "runs" / "run-b-seed0")
    assert sweep_of(tmp_path, ["false", DONE, "false"]) == 0
    assert started(tmp_path) == "b"
    assert column(tmp_path, "end.top1") == ["0.5"] * 3


def test_a_run_that_is_only_collected_says_nothing_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, *_) = planned(tmp_path)
    shutil.copytree(made(first), first.path)
    assert sweep_of(tmp_path, [DONE] * 3) == 0
    a, b, c = [line for line in capsys.readouterr().out.splitlines() if "top-1" in line]
    assert "ETA" not in a
    assert "; ETA " in b
    assert c.endswith("ETA 0:00:00")


def test_run_without_a_validation_has_not_finished(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, [DONE, "echo nothing; true", DONE]) == 1
    assert column(tmp_path, "status") == ["finished", "failed", "finished"]
    assert "exit code 0, but there is no validation in its folder; the last line of" in column(tmp_path, "error")[1]


def test_folder_of_a_sweep_that_is_at_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.1)
    with lock_run(tmp_path), pytest.raises(ValueError, match="process .* --output$"):
        run_sweep(SWEEP, planned(tmp_path), tmp_path, command_of, [{}])
    assert not (tmp_path / "sweep.csv").exists()


@pytest.mark.parametrize("content", ["", "{", '{"a": {"status": "well"}}'])
def test_damaged_outcomes_are_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "outcomes.json").write_text(content)
    with pytest.raises(ValueError, match=r"^.*outcomes.json[^\n]*$"):
        read_outcomes(tmp_path)


def test_damaged_question_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / JSON).write_text("{}")
    with pytest.raises(ValueError, match="sweep.json is damaged: delete it, and pass all seeds"):
        with_seeds(tmp_path, 0)


def test_folder_with_another_configuration_is_refused(tmp_path: Path) -> None:
    (run, *_) = planned(tmp_path)
    write_config(run.path, to_dict(run.config), {})
    check_folders([run])
    moved = (
        "--data.root /elsewhere --data.device gpu --data.stall_seconds 5 --device cpu --num_threads 3 "
        "--data.num_threads 2"
    )
    check_folders(planned(tmp_path, *moved.split()))
    write_config(run.path, to_dict(with_precision(run.config, "cuda")), {})  # as a run on a GPU leaves it
    check_folders([run])
    with pytest.raises(ValueError, match="engine.precision .*tf32.* bf16"):
        check_folders(planned(tmp_path, "--engine.precision", "bf16"))
    write_config(run.path, to_dict(run.config), {})
    with pytest.raises(ValueError, match=r"run-a-seed0 .*epochs .*8.* 9.*--output"):
        check_folders(planned(tmp_path, "--epochs", "9"))
    # Another rule has other fields, on both sides.
    with pytest.raises(ValueError, match="optim.rule .*bop2ndorder.* latent_adam"):
        check_folders(planned(tmp_path, "--optim.rule", "latent_adam"))


def test_runs_of_other_replicas_do_not_join(tmp_path: Path) -> None:
    first, *others = runs = planned(tmp_path)
    write_config(first.path, to_dict(first.config), {"num_replicas": 2})
    check_folders(runs, ranks=2)
    with pytest.raises(ValueError, match=r"run-a-seed0 holds a run of 2 replicas.*would have 1: pass --ranks 2"):
        check_folders(runs, ranks=1)
    for run in others:
        write_config(run.path, to_dict(run.config), {"num_replicas": 2})
    check_folders(runs, ranks=1)  # all are continued, with the replicas that they have


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
