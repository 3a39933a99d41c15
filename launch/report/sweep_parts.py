"""A sweep whose seeds were run in several places: its parts become one."""

import dataclasses
from typing import Any

from bitfleet.launch.report.sweep_results import SweepResults, SweepRun, centre_of, group
from bitfleet.launch.sweep.table import HOW, flatten

FURTHER = "and from"
"""Fact: the other files that a sweep was read from."""


def belong_together(one: SweepResults, other: SweepResults) -> bool:
    """Whether two sweeps are parts of one: the same question to the same base, and no run in both."""
    same = (one.name, one.base, one.axes, one.facts.get("axes")) == (
        other.name,
        other.base,
        other.axes,
        other.facts.get("axes"),
    )
    names = {run.name for run in runs_of(one)}
    return same and _setting(one, other) == _setting(other, one) and names.isdisjoint(r.name for r in runs_of(other))


def join(one: SweepResults, other: SweepResults) -> SweepResults:
    """One sweep of the runs of two that belong together."""
    runs = [*runs_of(one), *runs_of(other)]
    facts = {**other.facts, **one.facts}
    for name in ("seeds", "git", "versions"):
        known, more = (_listed(results.facts.get(name)) for results in (one, other))
        if more != known:
            facts[name] = [*known, *(each for each in more if each not in known)]
    facts[FURTHER] = [*one.facts.get(FURTHER, []), str(other.path)]
    return dataclasses.replace(
        one, points=group(runs, one.axes), centre=centre_of({run.labels for run in runs}), facts=facts
    )


def runs_of(results: SweepResults) -> list[SweepRun]:
    """All runs, with and without a result."""
    return [run for point in results.points for run in (*point.finished, *point.others)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _setting(results: SweepResults, beside: SweepResults) -> Any:
    """What holds for all runs: a configuration, or, where one of two sweeps does not tell it, the options."""
    if "config" not in results.facts or "config" not in beside.facts:
        return results.facts.get("options")
    return {name: value for name, value in flatten(results.facts["config"]).items() if name not in (*HOW, "seed")}
