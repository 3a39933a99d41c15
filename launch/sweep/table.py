"""What a sweep writes: sweep.csv, one row a run, and sweep.json, what was asked. Both are replaced as a whole."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitfleet.configs.sweeps.sweep import PlannedRun, Sweep
from bitfleet.launch.sweep.outcomes import Outcome
from bitfleet.trainer.config import MACHINE, TrainConfig, to_dict
from bitfleet.trainer.metrics.metrics import read_metrics
from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.strict_json import to_json
from bitfleet.trainer.run.versions import git_revision, versions

CSV, JSON = "sweep.csv", "sweep.json"
MAX_POINTS = 200
"""Of a training curve; a longer one is thinned evenly, its last point kept. Validation curves are whole."""
PLACES = ("run_dir", "output", "resume")
"""Fields that say where a run is, not what it is."""
HOW = (*PLACES, "device", "num_threads", "preflight", *(f"data.{name}" for name in MACHINE))
"""Fields in which a run may differ from its earlier part, and from the same run elsewhere."""
END = {
    "loss": "train_loss",
    "top1": "train_top1",
    "flip_ratio": "flip_ratio",
    "images_per_second": "images_per_second",
    "skipped_steps": "skipped_steps",
}
"""Key of the last training line -> column."""
COLUMNS = (
    *(f"end.{key}" for key in ("top1", "top5", "loss", *END.values())),
    *("best.top1", "seconds", "error", "steps_per_epoch"),
    *(f"curve.{key}" for key in ("step", "top1", "loss", "train_step", "train_loss", "flip_ratio")),
)
Cell = str | float | int


def write_table(folder: Path, sweep: Sweep, runs: Sequence[PlannedRun], outcomes: Mapping[str, Outcome]) -> None:
    """Write sweep.csv into `folder`: a row for each of `runs`, also for those that are still to come.

    Columns: run, status (finished, failed, pending), seed; axis.<axis>; config.<field> for what differs between the runs; end.*,
    best.top1, curve.* (JSON lists) from metrics.jsonl, accuracies as fractions; seconds over all attempts; error.
    """
    differing = differing_fields([run.config for run in runs])
    axes = list(sweep.axes)
    head = ["run", "status", "seed", *(f"axis.{axis}" for axis in axes), *(f"config.{field}" for field in differing[0])]
    text = io.StringIO()
    table = csv.DictWriter(text, [*head, *COLUMNS], restval="", lineterminator="\n")
    table.writeheader()
    for run, fields in zip(runs, differing, strict=True):
        outcome = outcomes.get(run.name, Outcome())
        row: dict[str, Cell] = {"run": run.name, "status": outcome.status, "seed": run.config.seed}
        row |= {f"axis.{axis}": value for axis, value in run.point.labels.items()}
        row |= {f"config.{field}": _cell(value) for field, value in fields.items()}
        row |= {"seconds": round(outcome.seconds, 1), "error": outcome.error}
        table.writerow(row | curves(read_metrics(run.path)))
    write_atomically(folder / CSV, text.getvalue())


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Cell]:
    """The columns that come from the lines of a run's metrics.jsonl; empty for what has not come yet."""
    lines = list(lines)
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    row: dict[str, Cell] = {}
    if validation:
        row |= {f"end.{key}": _cell(validation[-1][key]) for key in ("top1", "top5", "loss")}
        row["best.top1"] = max(line["top1"] for line in validation)
        row |= {f"curve.{key}": to_json([_short(line[key]) for line in validation]) for key in ("step", "top1", "loss")}
    if train:
        row |= {f"end.{column}": _cell(train[-1][key]) for key, column in END.items() if key in train[-1]}
        row["steps_per_epoch"] = round(train[-1]["step"] / train[-1]["epoch"])
        every = -(-len(train) // MAX_POINTS)
        kept = train[::-1][::every][::-1]
        for key, column in (("step", "train_step"), ("loss", "train_loss"), ("flip_ratio", "flip_ratio")):
            if any(key in line for line in train):
                row[f"curve.{column}"] = to_json([_short(line.get(key)) for line in kept])
    return row


def write_question(folder: Path, sweep: Sweep, words: Sequence[str], runs: Sequence[PlannedRun]) -> None:
    """Write sweep.json into `folder`: what was asked, with git revision and versions.

    `config` is the resolved configuration of the first of `runs` without its place: with what differs, in sweep.csv, it is that
    of every run.
    """
    content = {
        "name": sweep.name,
        "title": sweep.title,
        "question": sweep.question,
        "base": sweep.base,
        "axes": sweep.axes,
        "seeds": list(dict.fromkeys(run.config.seed for run in runs)),
        "options": list(words),
        "config": {field: value for field, value in to_dict(runs[0].config).items() if field not in PLACES},
        "git": git_revision(),
        "versions": versions(),
    }
    write_atomically(folder / JSON, to_json(content, indent=2) + "\n")


def differing_fields(configs: Sequence[TrainConfig]) -> list[dict[str, Any]]:
    """For each configuration the fields, dotted, in which it differs from any other; where the runs are is left out."""
    flat = [flatten(to_dict(config)) for config in configs]
    # A schedule that a rule does not have is None, and its fields are nowhere.
    fields = dict.fromkeys(field for each in flat for field, value in each.items() if value is not None)
    kept = [
        field
        for field in fields
        if field not in PLACES and any(other.get(field) != flat[0].get(field) for other in flat)
    ]
    return [{field: each.get(field) for field in kept} for each in flat]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of dictionaries as dotted names -> leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _cell(value: Any) -> Cell:
    return "" if value is None else value if isinstance(value, str | int | float) else to_json(value)


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")
