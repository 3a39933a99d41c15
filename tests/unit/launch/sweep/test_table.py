import csv
import dataclasses
import itertools
import json
from pathlib import Path

from pydantic import TypeAdapter

from bitfleet.configs.sweeps.sweep import Figure, Point, Sweep, plan_runs
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.launch.sweep.table import CSV, JSON, MAX_POINTS, Outcome, curves, write_question, write_table
from bitfleet.trainer.config import from_dict


def train(step: int, loss: float) -> dict[str, float | str]:
    line = {"step": step, "loss": loss, "top1": 0.5, "top5": 1.0, "epoch": step / 20, "flip_ratio": 1e-3 / step}
    return {"kind": "train", "images_per_second": 100.0, **line}


def validation(step: int, top1: float) -> dict[str, float | str]:
    return {"kind": "validation", "step": step, "loss": 1.0, "top1": top1, "top5": 0.9, "num_images": 10}


def test_curves_and_ends_of_a_run() -> None:
    row = curves([train(10, 2.0), train(20, 1.5), validation(20, 0.625), train(40, 1.23456789), validation(40, 0.5)])
    assert (row["end.top1"], row["best.top1"], row["end.train_loss"]) == (0.5, 0.625, 1.23456789)
    assert row["steps_per_epoch"] == 20
    assert json.loads(str(row["curve.step"])) == [20, 40]
    assert json.loads(str(row["curve.top1"])) == [0.625, 0.5]
    assert json.loads(str(row["curve.train_step"])) == [10, 20, 40]
    assert json.loads(str(row["curve.train_loss"])) == [2.0, 1.5, 1.23457]
    assert json.loads(str(row["curve.flip_ratio"])) == [1e-4, 5e-5, 2.5e-5]
    assert curves([]) == {}


def test_what_is_not_finite_is_an_empty_cell_and_null() -> None:
    """A validation whose loss was not finite, and a report of skipped steps, which has neither loss
    nor flips."""
    skipped = {"kind": "train", "step": 20, "epoch": 1.0, "loss": None, "top1": None, "images_per_second": 0.0}
    row = curves([train(10, 2.0), {**skipped, "skipped_steps": 10}, {**validation(20, 0.25), "loss": None}])
    assert (row["end.loss"], row["end.train_loss"], row["end.train_top1"], row["end.skipped_steps"]) == ("", "", "", 10)
    assert (row["curve.loss"], row["curve.train_loss"], row["curve.flip_ratio"]) == (
        "[null]",
        "[2.0, null]",
        "[0.0001, null]",
    )


def test_long_training_curve_is_thinned_and_keeps_its_end() -> None:
    steps = json.loads(str(curves([train(step, 1.0) for step in range(10, 10_010, 10)])["curve.train_step"]))
    assert len(steps) == MAX_POINTS
    assert steps[-1] == 10_000
    assert {later - earlier for earlier, later in itertools.pairwise(steps)} == {50}


def test_table_has_a_row_for_every_run_and_the_fields_that_differ(tmp_path: Path) -> None:
    points = (Point({"norm": "batch"}, ("--model.norm", "batch")), Point({"other": 2.0}, ("--model.depths", "1", "2")))
    figure = Figure(facets="norm", grids=(("norm", "other"),), centre={"other": 2.0}, labels={"batch": "BatchNorm"})
    sweep = Sweep(
        "s", "Title", "Question?", "fashion_small", {"norm": ("batch",), "other": (2.0,)}, points, (0,), figure
    )
    runs = plan_runs(sweep, tmp_path, ["--epochs", "2"], lambda words: parse_train(words, "t"))
    run_dir = runs[0].config.run_dir
    assert run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text(f"{json.dumps(train(10, 2.0))}\n{json.dumps(validation(20, 0.25))}\n")
    (run_dir / "config.json").write_text(json.dumps({"config": {}, "num_replicas": 2, "data_sha": "a1"}))
    write_table(
        tmp_path,
        sweep,
        runs,
        {"norm-batch-seed0": Outcome("finished", 12.34), "other-2-seed0": Outcome("failed", 3, 2, "no, it")},
    )
    write_question(tmp_path, sweep, ["--epochs", "2"], runs)
    with (tmp_path / CSV).open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["run"], first["status"], first["seed"], first["seconds"]) == (
        "norm-batch-seed0",
        "finished",
        "0",
        "12.3",
    )
    assert (first["axis.norm"], first["axis.other"]) == ("batch", "")
    assert (first["end.top1"], first["curve.step"]) == ("0.25", "[20]")
    assert (first["run.num_replicas"], first["run.data_sha"], second["run.data_sha"]) == ("2", "a1", "")
    assert (second["status"], second["error"], second["end.top1"]) == ("failed", "no, it", "")
    assert second["config.model.depths"] == "[1, 2]"
    assert [name for name in first if name.startswith("config.")] == ["config.model.depths"]  # "batch" is the base's
    asked = json.loads((tmp_path / JSON).read_text())
    assert (asked["axes"], asked["base"], asked["options"]) == (
        {"norm": ["batch"], "other": [2.0]},
        "fashion_small",
        ["--epochs", "2"],
    )
    assert TypeAdapter(Figure).validate_python(asked["figure"]) == sweep.figure
    # The configuration of the first run, and what differs, is that of every run.
    assert asked["config"].keys().isdisjoint({"run_dir", "output", "resume"})
    assert from_dict(asked["config"]) == dataclasses.replace(runs[0].config, run_dir=None, resume=None)
    assert asked["config"]["model"]["depths"] != json.loads(second["config.model.depths"]) == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


def test_field_that_only_tells_where_a_run_is_does_not_differ(tmp_path: Path) -> None:
    sweep = Sweep("s", "T", "Q?", "fashion_small", {"a": (1.0,)}, (Point({"a": 1.0}, ()),), (0, 1))
    runs = plan_runs(sweep, tmp_path, [], lambda words: parse_train(words, "t"))
    assert runs[0].config.run_dir != runs[1].config.run_dir
    write_table(tmp_path, sweep, [dataclasses.replace(run) for run in runs], {})
    header = (tmp_path / CSV).read_text().splitlines()[0].split(",")
    assert [name for name in header if name.startswith("config.")] == ["config.seed"]
