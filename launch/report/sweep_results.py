"""Read a sweep: sweep.csv, one row per run, and sweep.json with its axes and its figure."""

import csv
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError

from bitfleet.configs.sweeps import available_sweeps, load_sweep
from bitfleet.configs.sweeps.sweep import TABLE, Figure, Label
from bitfleet.launch.report.intervals import Spread, spread
from bitfleet.launch.sweep.table import CSV, HOW, flatten

STATUSES = ("finished", "failed", "pending")
CURVES = {"top1": "step", "loss": "step", "train_loss": "train_step", "flip_ratio": "train_step"}
"""Curve -> curve that holds its steps."""
FURTHER = "and from"
"""Name of the fact that lists the other files of a sweep."""
Labels = tuple[tuple[str, Label], ...]
"""(axis, value) for each axis that a point sets."""
Value = TypeVar("Value")


class Curve(NamedTuple):
    """A number over the optimizer steps."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SweepRun:
    """One row of sweep.csv: a point with a seed."""

    name: str
    status: str
    seed: str
    labels: Labels
    end: Mapping[str, float]
    """Last values by the columns end.*, "best.top1" and "seconds"; accuracies are fractions."""
    error: str
    curves: Mapping[str, Curve]
    config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Cells of the columns config.*: fields that differ between the runs."""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Cells of the columns run.* that are not empty."""


@dataclasses.dataclass(frozen=True, slots=True)
class SweepPoint:
    """All seeds of one point."""

    labels: Labels
    name: str
    """Words that tell it from the other points."""
    finished: Sequence[SweepRun]
    others: Sequence[SweepRun]
    """Runs without a result: failed and pending ones."""

    def get(self, axis: str) -> Label | None:
        """Return the value on `axis`; None if the point does not set it."""
        return dict(self.labels).get(axis)

    def without(self, *axes: str) -> Labels:
        """Return the labels on all other axes."""
        return tuple((axis, value) for axis, value in self.labels if axis not in axes)

    def values(self, key: str, seed: str | None = None) -> list[float]:
        """Return the finite last values of `key`, of every seed or of one."""
        runs = [run for run in self.finished if seed in (None, run.seed)]
        return [run.end[key] for run in runs if math.isfinite(run.end.get(key, math.nan))]

    def end(self, key: str) -> Spread | None:
        """Return the spread of the last values of `key` over the seeds."""
        return spread(self.values(key))

    @property
    def top1(self) -> Spread | None:
        """Last top-1 of the validation over the seeds; None if no run finished."""
        return self.end("top1")


@dataclasses.dataclass(frozen=True)
class SweepResults:
    """A sweep and its runs."""

    path: Path
    name: str
    title: str
    question: str
    base: str
    axes: Mapping[str, Sequence[Label]]
    figure: Figure
    runs: tuple[SweepRun, ...]
    facts: Mapping[str, Any]
    """The rest of sweep.json."""

    @functools.cached_property
    def points(self) -> tuple[SweepPoint, ...]:
        """The points, in the order of the values on the axes; around a centre it comes first, then
        axis by axis."""
        groups: dict[Labels, tuple[list[SweepRun], list[SweepRun]]] = {}
        for run in self.runs:
            has_result = run.status == "finished" and math.isfinite(run.end.get("top1", math.nan))
            groups.setdefault(run.labels, ([], []))[not has_result].append(run)
        return tuple(
            SweepPoint(labels, self._name(labels), *groups[labels]) for labels in sorted(groups, key=self._order)
        )

    @property
    def ranked(self) -> list[SweepPoint]:
        """Points with a result, the best first."""
        return sorted((point for point in self.points if point.top1), key=mean_top1, reverse=True)

    def word(self, value: Label | None) -> str:
        """Return the name of a value of an axis."""
        return "as configured" if value is None else self.figure.labels.get(str(value)) or show(value)

    def _order(self, labels: Labels) -> list[Any]:
        values, centre = dict(labels), self.figure.centre
        order: list[Any] = [bool(centre) and values != dict(centre)]
        for axis, known in self.axes.items():
            value = values.get(axis)
            order.append(
                (axis in centre and value == centre[axis], known.index(value) if value in known else len(known))
            )
        return order

    def _name(self, labels: Labels) -> str:
        centre = self.figure.centre
        away = [f"{axis} {self.word(value)}" for axis, value in labels if axis in centre and value != centre[axis]]
        parts = []
        for axis, value in labels:  # a word stands alone if no other axis has it
            is_clear = isinstance(value, str) and sum(value in values for values in self.axes.values()) < 2
            parts.append(self.word(value) if is_clear else f"{axis} {self.word(value)}")
        return ", ".join(away or parts) or "as configured"


def mean_top1(point: SweepPoint) -> float:
    """Return the mean top-1 of a point; minus infinity if no run finished."""
    return point.top1.mean if point.top1 else -math.inf


def show(value: Label) -> str:
    """Write a value as readers expect it: 1e-4 rather than 0.0001 or 1e-04."""
    if isinstance(value, str):
        return value
    if 0.0 < abs(value) < 0.01 or abs(value) >= 1e5:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def read_sweep(path: Path) -> SweepResults:
    """Read the sweep of a folder with sweep.csv, or of a CSV file.

    Raises:
        ValueError: the file is not a sweep, is empty or damaged.
    """
    file = path / CSV if path.is_dir() else path
    csv.field_size_limit(2**31 - 1)  # a curve of a long run is one cell
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            rows, columns = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read the sweep {file}: {error}") from error
    for column in ("run", "status", "seed"):
        if column not in columns:
            raise ValueError(
                f"{file} is not a sweep: it has no column {column!r}; expected the {CSV} that `bitfleet sweep` writes"
            )
    if not rows:
        raise ValueError(f"the sweep {file} is empty: expected a row for each run")
    names = [row["run"] for row in rows]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ValueError(f"{file} has two rows of the run {twice[0]!r}: expected one for each run, remove the other")
    return results_of(rows, file, read_object(facts) if (facts := file.with_suffix(".json")).is_file() else {})


def check_has_results(results: SweepResults) -> None:
    """Raise ValueError if none of the runs of a sweep, all parts together, has finished."""
    if not results.ranked:
        failed = [run for run in results.runs if run.status == "failed"]
        reason = f"; the first failure: {failed[0].name}: {failed[0].error}" if failed else ""
        raise ValueError(
            f"no run of the sweep {results.path} has finished ({len(failed)} of {len(results.runs)} failed): "
            f"nothing to report{reason}"
        )


def read_object(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        ValueError: it cannot be read, or does not hold an object.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, not a {type(content).__name__}")
    return content


def check_config(config: Any, file: Path) -> None:
    """Raise ValueError unless the resolved configuration in `file`, and each section of it that
    reports read, is an object, and its number of classes a whole number."""
    parts = {"config": config}
    if isinstance(config, dict):
        parts |= {f"config.{name}": config.get(name, {}) for name in ("model", "data", "optim")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ValueError(f"{file} is damaged: {name} must be an object, not {json.dumps(part)[:40]}")
    if not isinstance(num_classes := config.get("model", {}).get("num_classes", 1), int):
        raise ValueError(
            f"{file} is damaged: config.model.num_classes must be a whole number, not {json.dumps(num_classes)[:40]}"
        )


def results_of(rows: Sequence[Mapping[str, str]], file: Path, facts: Mapping[str, Any]) -> SweepResults:
    """Return the sweep of rows with the columns of sweep.csv and the content of sweep.json.

    Raises:
        ValueError: a cell is damaged (its line in `file` is named), or the figure or the
            configuration is.
    """
    facts = dict(facts)
    name = str(facts.pop("name", file.parent.name if file.name == CSV else file.stem))
    columns = [column for column in rows[0] if column and column.startswith("axis.")]
    seen = {
        column.removeprefix("axis."): list(dict.fromkeys(row[column] for row in rows if row[column]))
        for column in columns
    }
    try:
        declared = TypeAdapter(dict[str, list[Label]]).validate_python(facts.get("axes") or {})
        figure = TypeAdapter(Figure).validate_python(facts.pop("figure")) if "figure" in facts else None
    except ValidationError as error:
        raise ValueError(f"{file.with_suffix('.json')} is damaged: {error.errors()[0]['msg']}") from error
    check_config(facts.get("config", {}), file.with_suffix(".json"))
    if not isinstance(options := facts.get("options", []), list):
        raise ValueError(f"{file.with_suffix('.json')} is damaged: options must be a list, not {str(options)[:40]}")
    axes: Mapping[str, Sequence[Label]] = {axis: declared.get(axis) or values for axis, values in seen.items()}
    if figure is None:  # version 0.1
        sweep = load_sweep(name) if name in available_sweeps() else None
        axes, figure = (sweep.axes, sweep.figure) if sweep and sweep.axes.keys() == axes.keys() else (axes, TABLE)
    return SweepResults(
        path=file,
        name=name,
        title=str(facts.pop("title", name)),
        question=str(facts.pop("question", "")),
        base=str(facts.pop("base", "")),
        axes=axes,
        figure=figure,
        runs=tuple(_read_run(row, axes, f"{file}:{line}") for line, row in enumerate(rows, start=2)),
        facts=facts,
    )


def _read_run(row: Mapping[str, str], axes: Mapping[str, Sequence[Label]], where: str) -> SweepRun:
    def cell(column: str, read: Callable[[str], Value], expected: str) -> Value:
        text = row.get(column) or ""
        try:
            return read(text)
        except (ValueError, TypeError):
            raise ValueError(f"{where}: {column} is {text[:40]!r}, expected {expected}") from None

    cell("status", STATUSES.index, f"one of: {', '.join(STATUSES)}")
    cell("seed", int, "a whole number")
    labels: list[tuple[str, Label]] = []
    for axis, values in axes.items():
        if text := row[f"axis.{axis}"]:
            is_word = any(isinstance(value, str) for value in values)
            labels.append((axis, text if is_word else cell(f"axis.{axis}", _read_finite, "a finite number")))
    numbers = [key for key in row if key and (key.startswith("end.") or key in ("best.top1", "seconds")) and row[key]]
    lists = {key: cell(f"curve.{key}", _read_list, "a JSON list of numbers") for key in {*CURVES, *CURVES.values()}}
    for steps in dict.fromkeys(CURVES.values()):
        if not all(low < high for low, high in itertools.pairwise(lists[steps])):
            raise ValueError(f"{where}: curve.{steps} is {row[f'curve.{steps}'][:40]!r}, expected ascending steps")
    curves = {}
    for key, steps in CURVES.items():
        if lists[key] and len(lists[key]) != len(lists[steps]):
            raise ValueError(
                f"{where}: curve.{key} has {len(lists[key])} values, but curve.{steps} has {len(lists[steps])}: "
                f"expected one per step"
            )
        finite = [pair for pair in zip(lists[steps], lists[key], strict=False) if math.isfinite(pair[1])]
        curves[key] = Curve(tuple(step for step, _ in finite), tuple(value for _, value in finite))
    end = {key.removeprefix("end."): cell(key, float, "a number") for key in numbers}
    config = {key.removeprefix("config."): row[key] or "" for key in row if key and key.startswith("config.")}
    facts = {key.removeprefix("run."): row[key] for key in row if key and key.startswith("run.") and row[key]}
    error = row.get("error") or ""
    return SweepRun(row["run"], row["status"], row["seed"], tuple(labels), end, error, curves, config, facts)


def _read_finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _read_list(text: str) -> list[float]:
    return [math.nan if value is None else float(value) for value in json.loads(text or "[]")]


def belong_together(one: SweepResults, other: SweepResults) -> bool:
    """Return True if two sweeps are parts of one: the same question and configuration, and no run
    in both."""
    same = all(getattr(one, name) == getattr(other, name) for name in ("name", "base", "figure")) and _values(
        one
    ) == _values(other)
    names = {run.name for run in one.runs}
    return same and _setting(one, other) == _setting(other, one) and names.isdisjoint(run.name for run in other.runs)


def join(one: SweepResults, other: SweepResults) -> SweepResults:
    """Return one sweep of the runs of two that belong together."""
    facts = {**other.facts, **one.facts}
    for name in ("seeds", "git", "versions"):
        known, more = (_as_list(results.facts.get(name)) for results in (one, other))
        if more != known:
            facts[name] = [*known, *(value for value in more if value not in known)]
    facts[FURTHER] = [*one.facts.get(FURTHER, []), str(other.path)]
    return dataclasses.replace(one, runs=(*one.runs, *other.runs), facts=facts)


def _values(results: SweepResults) -> dict[str, set[Label]]:
    return {axis: set(results.facts.get("axes", {}).get(axis, values)) for axis, values in results.axes.items()}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _setting(results: SweepResults, other: SweepResults) -> Any:
    """Return the common configuration of the runs; their options if either of two sweeps does not
    hold it."""
    if "config" not in results.facts or "config" not in other.facts:
        return results.facts.get("options")
    # None as if it were not there: fields are added with that default, and entries stay.
    config = flatten(results.facts["config"])
    return {name: value for name, value in config.items() if name not in HOW | {"seed"} and value is not None}
