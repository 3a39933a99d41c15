"""Write the files of a sweep, each atomically.

sweep.csv       one row per run, finished or not
sweep.json      the question: axes, figure, seeds, options, configuration
outcomes.json   status of each run
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bitfleet.configs.sweeps.sweep import PlannedRun, Sweep
from bitfleet.trainer.config import TrainConfig, to_dict
from bitfleet.trainer.metrics import read_metrics
from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.folder import CONFIG, read_facts
from bitfleet.trainer.run.roles import fields_with_role
from bitfleet.trainer.run.strict_json import to_json
from bitfleet.trainer.run.versions import git_revision, versions

CSV, JSON, OUTCOMES = "sweep.csv", "sweep.json", "outcomes.json"
MAX_POINTS = 200
"""Points of a training curve; a longer one is thinned evenly up to its last point. Validation
curves are complete."""
PLACES = fields_with_role(TrainConfig, "place")
HOW = fields_with_role(TrainConfig, "place", "machine", "host")
"""Fields in which a run may differ from its earlier part, and from the same run on another
machine."""
END = {
    "loss": "train_loss",
    "top1": "train_top1",
    "flip_ratio": "flip_ratio",
    "images_per_second": "images_per_second",
    "skipped_steps": "skipped_steps",
}
"""Key of the last training line -> column."""
FACTS = ("num_replicas", "data_sha")
"""Facts of config.json that a configuration leaves open: replicas are by default the ranks, and the
list of images (its sha256) is what was found in data.root."""
COLUMNS = (
    *(f"end.{key}" for key in ("top1", "top5", "loss", *END.values())),
    *("best.top1", "seconds", "error", "steps_per_epoch"),
    *(f"run.{key}" for key in FACTS),
    *(f"curve.{key}" for key in ("step", "top1", "loss", "train_step", "train_loss", "flip_ratio")),
)
Cell = str | float | int


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Status of a run of a sweep."""

    status: Literal["pending", "finished", "failed"] = "pending"
    seconds: float = 0.0
    """Seconds of all its attempts."""
    failures: int = 0
    """Number of failed attempts."""
    error: str = ""
    """Reason of the last failure; "" after success."""


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """Return name of a run -> outcome; empty for a folder without a sweep.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / OUTCOMES
    if not file.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Outcome]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{file} is damaged: delete it; the same command then continues each run from its last checkpoint, "
            f"which takes seconds for a finished one"
        ) from error


def write_outcomes(folder: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write `outcomes` into `folder`."""
    content = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
    write_atomically(folder / OUTCOMES, to_json(content, indent=1) + "\n")


def write_table(folder: Path, sweep: Sweep, runs: Sequence[PlannedRun], outcomes: Mapping[str, Outcome]) -> None:
    """Write sweep.csv into `folder`: a row for each of `runs`, finished or not.

    Columns: run, status (finished, failed, pending), seed; axis.<axis>; config.<field> for each
    field that differs between the runs; end.*, best.top1, curve.* (JSON lists) from metrics.jsonl,
    accuracies as fractions; run.* from config.json; seconds over all attempts; error.

    Raises:
        ValueError: the config.json of a run is damaged.
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
        row |= {f"config.{field}": cell(value) for field, value in fields.items()}
        row |= {"seconds": round(outcome.seconds, 1), "error": outcome.error}
        if (run.path / CONFIG).is_file():
            facts = read_facts(run.path)
            row |= {f"run.{key}": cell(facts.get(key)) for key in FACTS}
        table.writerow(row | curves(read_metrics(run.path)))
    write_atomically(folder / CSV, text.getvalue())


def curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Cell]:
    """Return the columns from the lines of metrics.jsonl; empty for values that are not there
    yet."""
    lines = list(lines)
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    row: dict[str, Cell] = {}
    if validation:
        row |= {f"end.{key}": cell(validation[-1][key]) for key in ("top1", "top5", "loss")}
        row["best.top1"] = max(line["top1"] for line in validation)
        row |= {f"curve.{key}": to_json([_short(line[key]) for line in validation]) for key in ("step", "top1", "loss")}
    if train:
        row |= {f"end.{column}": cell(train[-1][key]) for key, column in END.items() if key in train[-1]}
        row["steps_per_epoch"] = round(train[-1]["step"] / train[-1]["epoch"])
        every = -(-len(train) // MAX_POINTS)
        kept = train[::-1][::every][::-1]
        for key, column in (("step", "train_step"), ("loss", "train_loss"), ("flip_ratio", "flip_ratio")):
            if any(key in line for line in train):
                row[f"curve.{column}"] = to_json([_short(line.get(key)) for line in kept])
    return row


def write_question(folder: Path, sweep: Sweep, words: Sequence[str], runs: Sequence[PlannedRun]) -> None:
    """Write sweep.json into `folder`: the question, the axes and the figure, with git revision and
    versions.

    `config` is the resolved configuration of the first of `runs`, without places; with the config.*
    of a row of sweep.csv, it is that of any other run.
    """
    content = {
        "name": sweep.name,
        "title": sweep.title,
        "question": sweep.question,
        "base": sweep.base,
        "axes": {axis: list(values) for axis, values in sweep.axes.items()},
        "figure": dataclasses.asdict(sweep.figure),
        "seeds": list(dict.fromkeys(run.config.seed for run in runs)),
        "options": list(words),
        "config": {field: value for field, value in to_dict(runs[0].config).items() if field not in PLACES},
        "git": git_revision(),
        "versions": versions(),
    }
    write_atomically(folder / JSON, to_json(content, indent=2) + "\n")


def differing_fields(configs: Sequence[TrainConfig]) -> list[dict[str, Any]]:
    """Return, for each configuration, the fields (dotted) in which it differs from any other,
    without places."""
    flat = [flatten(to_dict(config)) for config in configs]
    # A schedule that a rule does not have is None and has no fields.
    fields = dict.fromkeys(field for values in flat for field, value in values.items() if value is not None)
    kept = [name for name in fields if name not in PLACES and any(v.get(name) != flat[0].get(name) for v in flat)]
    return [{field: values.get(field) for field in kept} for values in flat]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree of dictionaries as dotted name -> leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def cell(value: Any) -> Cell:
    """Return a JSON value as sweep.csv holds it; "" for None."""
    return "" if value is None else value if isinstance(value, str | int | float) else to_json(value)


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")
