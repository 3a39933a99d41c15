"""Reading sweep.csv, one row a run, and sweep.json beside it."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitfleet.launch.report.sweep_results import CURVES, Curve, Label, SweepResults, SweepRun, centre_of, group

CSV = "sweep.csv"
STATUSES = ("finished", "failed", "pending")


def read_sweep(path: Path) -> SweepResults:
    """The sweep of a folder with sweep.csv, or of a CSV file.

    Raises:
        ValueError: it is no sweep, it is empty or damaged, or none of its runs has finished.
    """
    file = path / CSV if path.is_dir() else path
    rows, columns = _read_rows(file)
    for column in ("run", "status", "seed"):
        if column not in columns:
            raise ValueError(
                f"{file} is not a sweep: it has no column {column!r}; expected the {CSV} that `bitfleet sweep` writes"
            )
    if not rows:
        raise ValueError(f"the sweep {file} is empty: expected a row for each run")
    axes = tuple(column.removeprefix("axis.") for column in columns if column.startswith("axis."))
    results = results_of(rows, axes, file, _read_facts(file.with_suffix(".json")))
    if not results.ranked:
        runs = results.unfinished
        failed = [run for run in runs if run.status == "failed"]
        why = f"; the first failure: {failed[0].name}: {failed[0].error}" if failed else ""
        raise ValueError(
            f"no run of the sweep {file} has finished ({len(failed)} of {len(runs)} failed): there is nothing to report{why}"
        )
    return results


def results_of(
    rows: Sequence[Mapping[str, str]], axes: tuple[str, ...], file: Path, facts: Mapping[str, Any]
) -> SweepResults:
    """Rows with the columns of sweep.csv, and the content of its sweep.json, as a sweep.

    Raises:
        ValueError: a cell is damaged; its line in `file` is named.
    """
    numeric = {axis for axis in axes if all(_is_number(row[f"axis.{axis}"]) for row in rows if row[f"axis.{axis}"])}
    runs = [_read_run(row, axes, numeric, f"{file}:{line}") for line, row in enumerate(rows, start=2)]
    facts = dict(facts)
    name = str(facts.pop("name", file.parent.name if file.name == CSV else file.stem))
    return SweepResults(
        path=file,
        name=name,
        title=str(facts.pop("title", name)),
        question=str(facts.pop("question", "")),
        base=str(facts.pop("base", "")),
        axes=axes,
        points=group(runs, axes),
        centre=centre_of({run.labels for run in runs}),
        facts=facts,
    )


def _read_rows(file: Path) -> tuple[list[dict[str, str]], list[str]]:
    csv.field_size_limit(2**31 - 1)  # a curve of a long run is one cell
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            return list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read the sweep {file}: {error}") from error


def _read_run(row: Mapping[str, str], axes: tuple[str, ...], numeric: set[str], where: str) -> SweepRun:
    if row["status"] not in STATUSES:
        raise ValueError(f"{where}: the status is {row['status']!r}, expected one of: {', '.join(STATUSES)}")
    labels: list[tuple[str, Label]] = []
    for axis in axes:
        if text := row[f"axis.{axis}"]:
            labels.append((axis, float(text) if axis in numeric else text))
    end = {key[4:]: _number(text, key, where) for key, text in row.items() if key and key.startswith("end.") and text}
    lists = {key: _list(row.get(f"curve.{key}") or "", key, where) for key in {*CURVES, *CURVES.values()}}
    curves = {}
    for key, steps in CURVES.items():
        if lists[key] and len(lists[key]) != len(lists[steps]):
            raise ValueError(
                f"{where}: curve.{key} has {len(lists[key])} values, but curve.{steps} has {len(lists[steps])}: "
                f"expected one a step"
            )
        finite = [pair for pair in zip(lists[steps], lists[key], strict=False) if math.isfinite(pair[1])]
        curves[key] = Curve(tuple(step for step, _ in finite), tuple(value for _, value in finite))
    return SweepRun(
        name=row["run"],
        status=row["status"],
        seed=row["seed"],
        labels=tuple(labels),
        end=end,
        best_top1=_number(row.get("best.top1") or "nan", "best.top1", where),
        seconds=_number(row.get("seconds") or "nan", "seconds", where),
        error=row.get("error") or "",
        curves=curves,
    )


def _read_facts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{file} must hold an object with title, question and base, not a {type(facts).__name__}")
    return facts


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(text: str, key: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: {key} is {text!r}, expected a number") from None


def _list(text: str, key: str, where: str) -> tuple[float, ...]:
    try:
        return tuple(math.nan if value is None else float(value) for value in json.loads(text)) if text else ()
    except (ValueError, TypeError):
        raise ValueError(f"{where}: curve.{key} is not a JSON list of numbers: {text[:40]!r}") from None
