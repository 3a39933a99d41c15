"""Several runs beside each other, as the points and seeds of a sweep that nobody planned."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitfleet.launch.report.page import Block, Table
from bitfleet.launch.report.run_results import RunResults
from bitfleet.launch.report.sweep_reader import results_of
from bitfleet.launch.report.sweep_results import SweepResults
from bitfleet.launch.sweep.table import HOW, curves, flatten

NAME = "runs-compared"
HABITS = ("name", "stop_after_steps", "validate_every_epochs")
ROOMS_OF_HABITS = ("checkpoint.", "metrics.", "journal.")
"""What says how a run is kept and watched, not what it trains."""
PROGRESS = "progress"
"""Axis of the runs that have not ended."""


def compare(runs: Sequence[RunResults]) -> SweepResults | None:
    """`runs` as a sweep: those that differ in the seed alone are one point; None where less than two have a validation.

    A point is named by the settings that tell it from the others; one that follows from those named before it is left to the
    table of `differences`. A run that has not ended stands with its last validation, and says how far it is.
    """
    judged = [run for run in runs if run.last("validation")]
    if len(judged) < 2:
        return None
    settings = [_setting(run) | _progress(run) for run in judged]
    fields = _telling(settings)
    axes = tuple(map(_axis, fields))
    rows = []
    for run, setting in zip(judged, settings, strict=True):
        labels = {f"axis.{_axis(field)}": _word(field, setting.get(field)) for field in fields}
        row = {"run": str(run.path), "status": "finished", "seed": str(run.config.get("seed"))}
        rows.append(row | labels | {key: str(cell) for key, cell in curves(run.lines).items()})
    names = {str(run.config.get("name")) for run in judged}
    return results_of(
        rows,
        axes,
        Path(os.path.commonpath([run.path.resolve() for run in judged])),
        {
            "name": NAME,
            "title": f"{len(judged)} runs compared",
            "question": "Which setting is better, and by more than its seeds differ?",
            "base": names.pop() if len(names) == 1 else "several",  # which has no published accuracies
            "config": judged[0].config,
        },
    )


def differences(runs: Sequence[RunResults]) -> Block:
    """A row a run, a column for each setting that is not the same in all of them."""
    settings = [_setting(run) for run in runs]
    fields = [field for field in _fields(settings) if len({repr(each.get(field)) for each in settings}) > 1]
    return Block(
        heading="What differs between the runs",
        text="" if fields else "Nothing but the seed.",
        table=Table(
            header=("run", "seed", *map(_axis, fields)),
            rows=tuple(
                (
                    str(run.path),
                    str(run.config.get("seed")),
                    *("-" if each.get(field) is None else str(each[field]) for field in fields),
                )
                for run, each in zip(runs, settings, strict=True)
            ),
        ),
    )


def _setting(run: RunResults) -> dict[str, Any]:
    """Dotted name -> value of what decides what `run` trains, its seed apart."""
    return {
        field: value
        for field, value in flatten(run.config).items()
        if field not in (*HOW, *HABITS, "seed") and not field.startswith(ROOMS_OF_HABITS)
    }


def _progress(run: RunResults) -> dict[str, Any]:
    train, epochs = run.last("train"), run.config.get("epochs")
    if not train.get("epoch") or not epochs:
        return {}
    steps_per_epoch = round(train["step"] / train["epoch"])
    step = run.last("validation")["step"]
    if step >= epochs * steps_per_epoch:
        return {}
    return {PROGRESS: f"after {step / steps_per_epoch:.1f} of {epochs} epochs"}


def _fields(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(field for each in settings for field, value in each.items() if value is not None))


def _telling(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields that each tell more runs apart than those before them, the optimizer's first."""
    kept: list[str] = []
    groups = [""] * len(settings)
    for field in sorted(_fields(settings), key=lambda field: (field == PROGRESS, not field.startswith("optim."))):
        finer = [f"{group}|{each.get(field)!r}" for group, each in zip(groups, settings, strict=True)]
        if len(set(finer)) > len(set(groups)):
            kept.append(field)
            groups = finer
    return kept


def _axis(field: str) -> str:
    """A hyperparameter's usual name."""
    return field.removeprefix("optim.").removesuffix(".start")


def _word(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"{_axis(field)} {'on' if value else 'off'}"
    return "" if value is None else str(value)
