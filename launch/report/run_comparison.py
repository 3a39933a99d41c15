"""Compare several runs: one table of their accuracy and of the settings in which they differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitfleet.configs.sweeps.sweep import TABLE
from bitfleet.launch.report.page import Block, Section, Table
from bitfleet.launch.report.run_results import RunResults
from bitfleet.launch.report.sweep_findings import answer
from bitfleet.launch.report.sweep_results import SweepResults, SweepRun
from bitfleet.launch.sweep.table import HOW, flatten
from bitfleet.launch.text import percent
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.run.roles import fields_with_role

NAME = "runs-compared"
OTHERS = HOW | fields_with_role(TrainConfig, "habit") | {"seed"}
"""Fields that do not decide what a run trains, and the seed."""
PROGRESS = "progress"


def compare(runs: Sequence[RunResults]) -> Section | None:
    """Return the section that compares `runs`; None for less than two.

    Runs that differ only in the seed count as one setting in the answer, with mean and standard
    deviation.
    """
    if len(runs) < 2:
        return None
    differing = _differing(runs)
    fields = list(dict.fromkeys(field for settings in differing for field in settings))
    validations = [run.last("validation") for run in runs]
    judged = [number for number, validation in enumerate(validations) if validation]
    naming = _naming(fields, differing)
    points = []
    for number in judged:
        labels = tuple((field, f"{field} {differing[number][field]}") for field in naming if field in differing[number])
        seed, end = str(runs[number].config.get("seed")), {"top1": validations[number]["top1"]}
        points.append(SweepRun(str(runs[number].path), "finished", seed, labels, end, "", {}))
    results = SweepResults(Path(), NAME, NAME, "", "", {}, TABLE, tuple(points), {})
    best = max(judged, key=lambda number: validations[number]["top1"], default=-1)
    rows = [
        (
            str(run.path),
            str(run.config.get("seed")),
            *(percent(validation.get(key)) for key in ("top1", "top5")),
            *(settings.get(field, "-") for field in fields),
        )
        for run, validation, settings in zip(runs, validations, differing, strict=True)
    ]
    table = Table(header=("run", "seed", "top-1", "top-5", *fields), rows=rows, strong=frozenset({best}))
    heading = "Accuracy, and what differs between the runs"
    return Section(
        key=NAME,
        title=f"{len(runs)} runs compared",
        answer=answer(results) if len(judged) > 1 else (),
        blocks=(Block(heading=heading, text="" if fields else "Nothing but the seed differs.", table=table),),
    )


def _differing(runs: Sequence[RunResults]) -> list[dict[str, str]]:
    """Return, per run, the settings that are not the same in all of them, as text."""
    settings = [_settings(run) for run in runs]
    fields = dict.fromkeys(field for of_run in settings for field in of_run)
    kept = [field for field in fields if len({repr(of_run.get(field)) for of_run in settings}) > 1]
    return [
        {_axis(field): str(of_run[field]) for field in kept if of_run.get(field) is not None} for of_run in settings
    ]


def _naming(fields: Sequence[str], differing: Sequence[dict[str, str]]) -> list[str]:
    """Return the fields that name a setting: those of every run, and of the others those in which
    runs differ that are alike in the fields before."""
    naming = [field for field in fields if field == PROGRESS or all(field in settings for settings in differing)]
    for field in fields:  # most follow from another one, as from the rule
        seen: dict[tuple[str | None, ...], str | None] = {}
        alike = [(tuple(map(settings.get, naming)), settings.get(field)) for settings in differing]
        if any(seen.setdefault(key, value) != value for key, value in alike):
            naming.append(field)
    return naming


def _settings(run: RunResults) -> dict[str, Any]:
    """Return dotted name -> value of the fields that decide the training of `run`, without its
    seed."""
    settings = {name: value for name, value in flatten(run.config).items() if name not in OTHERS}
    settings["num_replicas"] = run.facts.get("num_replicas")  # unset, they follow from the ranks
    return settings | _progress(run)


def _progress(run: RunResults) -> dict[str, Any]:
    """Return the epoch of the last validation of a run that has not ended."""
    train, epochs = run.last("train"), run.config.get("epochs")
    if not train.get("epoch") or not epochs:
        return {}
    steps_per_epoch = round(train["step"] / train["epoch"])
    step = run.last("validation").get("step", 0)
    if step >= epochs * steps_per_epoch:
        return {}
    return {PROGRESS: f"after {step / steps_per_epoch:.1f} of {epochs} epochs"}


def _axis(field: str) -> str:
    """Return the usual name of a hyperparameter."""
    return field.removeprefix("optim.").removesuffix(".start")
