"""Check recorded entries of the track against its rules, and rank them."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from bitfleet.configs import load_config
from bitfleet.configs.sweeps.entry import BASE, FREE, MIN_SEEDS, TARGET
from bitfleet.launch.report.intervals import CONFIDENCE, plus_minus, spread, steps_to
from bitfleet.launch.report.sweep_results import (
    Curve,
    SweepResults,
    SweepRun,
    belong_together,
    check_has_results,
    join,
    read_sweep,
)
from bitfleet.launch.sweep.table import CSV, HOW, cell, flatten
from bitfleet.launch.text import percent, table
from bitfleet.trainer.config import TrainConfig, to_dict
from bitfleet.trainer.run.roles import fields_with_role

IGNORED = HOW | fields_with_role(TrainConfig, "execution", "habit")
"""Fields that do not change what is trained."""
EPOCH = 1_000
"""Steps between validations: 50,000 images in batches of 50."""
NUM_IMAGES = 10_000
"""Images of a validation."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A recorded entry."""

    path: Path
    """Folder, the first if there are several."""
    title: str
    epochs: int
    steps: tuple[float, ...]
    """Steps to the target of each run that reached it."""
    top1: tuple[float, ...]
    """Last top-1 of each finished run."""
    faults: tuple[str, ...]
    """Rules that it breaks, a sentence each."""
    data_sha: str = ""
    """sha256 of the list of images; "" if no run has recorded it."""
    precise_bn_steps: int | None = None
    """Steps whose images give the BatchNorm statistics of a validation; None: running averages."""


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """Read the folders of entries and check them.

    Args:
        paths: folders with the sweep.csv and sweep.json of `bitfleet sweep track_NAME`. Those that
            hold different seeds of one setting are one entry, in the place of the first.

    Raises:
        ValueError: one holds no entry.
    """
    whole: list[tuple[Path, SweepResults]] = []
    for path in paths:
        part = _read(path)
        for number, (first, earlier) in enumerate(whole):
            if belong_together(earlier, part):
                whole[number] = first, join(earlier, part)
                break
        else:
            whole.append((path, part))
    for _, results in whole:
        check_has_results(results)
    return [_checked(path, results) for path, results in whole]


def _read(path: Path) -> SweepResults:
    """Return the sweep of an entry, or of some of its seeds."""
    if not path.is_file() and not (path / CSV).is_file():
        raise ValueError(
            f"there is no {CSV} in {path}: expected the folder of an entry, as `bitfleet sweep track_NAME` writes it"
        )
    results = read_sweep(path)
    if len(results.points) != 1 or "config" not in results.facts:
        raise ValueError(
            f"{path} holds {len(results.points)} points: expected the sweep.csv and sweep.json of one entry, "
            "as `bitfleet sweep track_NAME` writes them"
        )
    epochs = results.facts["config"].get("epochs")
    if not isinstance(epochs, int):
        raise ValueError(f"the config in {results.path.with_suffix('.json')} has epochs {epochs!r}: expected a number")
    return results


def _checked(path: Path, results: SweepResults) -> Entry:
    (point,) = results.points
    epochs = results.facts["config"]["epochs"]
    reached = {run.seed: steps_to(*run.curves["top1"], TARGET) for run in point.finished}
    faults = [
        f"seed {run.seed} is at most at {percent(max(run.curves['top1'].values))} and never at {percent(TARGET, 0)}"
        if run.curves["top1"].values
        else f"seed {run.seed} has no curve of top-1"
        for run in point.finished
        if reached[run.seed] is None
    ]
    faults += [
        f"the last top-1 of seed {run.seed} is not a number"
        if run.status == "finished"
        else f"seed {run.seed} is {run.status}"
        for run in point.others
    ]
    seeds = sorted(int(run.seed) for run in results.runs)
    if seeds != list(range(max(MIN_SEEDS, len(seeds)))):
        faults.append(
            f"it has the seeds {', '.join(map(str, seeds))}; expected 0 to {MIN_SEEDS - 1}, or all up to more"
        )
    return Entry(
        path=path,
        title=point.name,
        epochs=epochs,
        steps=tuple(steps for steps in reached.values() if steps is not None),
        top1=tuple(point.values("top1")),
        faults=(
            *faults,
            *_contradictions(point.finished, epochs),
            *_changed(results),
            *_differing(results),
            *_other_facts(results),
        ),
        data_sha=next(iter(_seeds_by(results, "data_sha")), ""),
        precise_bn_steps=results.facts["config"].get("precise_bn_steps"),
    )


def _contradictions(runs: Sequence[SweepRun], epochs: int) -> list[str]:
    """Return a sentence for each row that contradicts itself, another one or `epochs`."""
    faults = []
    curves: dict[tuple[Curve, Curve], str] = {}
    for run in runs:
        if run.config.get("seed", run.seed) != run.seed:
            faults.append(f"the row of seed {run.seed} is that of a run with seed {run.config['seed']}")
        steps, values = curve = run.curves["top1"]
        if not values:
            continue
        if steps != tuple(range(EPOCH, EPOCH * epochs + 1, EPOCH)):
            faults.append(
                f"the curve of seed {run.seed} has {len(steps)} validations, the last after step {steps[-1]:,.0f}; "
                f"expected one after each {EPOCH:,} steps, up to {EPOCH * epochs:,}"
            )
        if strange := [value for value in values if not _is_fraction(value)]:
            faults.append(
                f"seed {run.seed} has a top-1 of {strange[0]}, which is not a fraction of {NUM_IMAGES:,} images"
            )
        if not math.isclose(values[-1], run.end["top1"], abs_tol=1e-6):
            faults.append(f"the curve of seed {run.seed} ends at {values[-1]}, and its last top-1 is {run.end['top1']}")
        if (first := curves.setdefault((curve, run.curves["loss"]), run.seed)) != run.seed:
            faults.append(f"the seeds {first} and {run.seed} have the same curve")
    return faults


def _is_fraction(value: float) -> bool:
    images = value * NUM_IMAGES
    return 0 <= images <= NUM_IMAGES and math.isclose(images, round(images), abs_tol=1e-3)


def _differing(results: SweepResults) -> list[str]:
    """Return a sentence for each field that an entry chooses, but not once for all of its runs."""
    found: dict[str, dict[str, None]] = {}
    for run in results.runs:
        for field, value in run.config.items():
            found.setdefault(field, {})[value] = None
    return [
        f"{field} is {' and '.join(values)}: all runs of an entry have one setting"
        for field, values in found.items()
        if len(values) > 1 and field.startswith(FREE) and field not in IGNORED | {"seed"}
    ]


def _changed(results: SweepResults) -> list[str]:
    """Return a sentence for each field that the rules fix and the entry changed, in all its runs or
    in one."""
    fixed, common = flatten(to_dict(load_config(BASE))), flatten(results.facts["config"])
    given = [(field, common.get(field)) for field in {**fixed, **common}]
    given += [pair for run in results.runs for pair in run.config.items()]
    faults = [
        f"{field} is {value}, and every entry has {fixed.get(field)}"
        for field, value in given
        if field not in IGNORED and not field.startswith(FREE) and str(cell(value)) != str(cell(fixed.get(field)))
    ]
    return sorted(set(faults))


def _other_facts(results: SweepResults) -> list[str]:
    """Return a sentence for runs that were not one replica, or saw other images than the first."""
    faults = [
        f"seed {', '.join(seeds)} ran with {replicas} replicas, each with its own BatchNorm statistics, and every "
        "entry has 1"
        for replicas, seeds in _seeds_by(results, "num_replicas").items()
        if replicas != "1"
    ]
    (_, first), *others = [*_seeds_by(results, "data_sha").items()] or [("", [])]
    faults += [f"seed {', '.join(seeds)} had another list of images than seed {first[0]}" for _, seeds in others]
    return faults


def _seeds_by(results: SweepResults, fact: str) -> dict[str, list[str]]:
    """Return value of `fact` -> seeds of the runs that have recorded it."""
    seeds: dict[str, list[str]] = {}
    for run in results.runs:
        if value := run.facts.get(fact):
            seeds.setdefault(value, []).append(run.seed)
    return seeds


def ranking(entries: Sequence[Entry]) -> str:
    """Return the table of `entries`, the fewest steps first, and after it their faults.

    Of equal numbers of steps, as there are many where all runs arrive in their last epoch, the
    higher top-1 at the end comes first. p is that of Welch's t-test of the steps against the first;
    entries with faults come last, without a place. After the faults: which entries validated with
    precise BN, and which had other images than the first that has recorded its own.
    """
    ranked = sorted(entries, key=_place)
    rows = [["", "entry", "epochs", "n", f"steps to {TARGET:.0%}", "95 % interval", "p", "top-1 at the end, %"]]
    for place, entry in enumerate(ranked, start=1):
        steps = spread(entry.steps)
        rows.append(
            [
                "-" if entry.faults else f"{place}",
                entry.title,
                f"{entry.epochs}",
                f"{len(entry.top1)}",
                "never" if steps is None else f"{steps.mean:,.0f}",
                _interval(entry.steps),
                "" if entry is ranked[0] else _p_value(ranked[0].steps, entry.steps),
                plus_minus(spread(entry.top1), digits=2),
            ]
        )
    faults = [f"{entry.path}: {fault}" for entry in ranked for fault in entry.faults]
    known = [entry for entry in ranked if entry.data_sha]
    remarks = [
        f"{entry.title} was validated with the BatchNorm statistics of its last {entry.precise_bn_steps} steps"
        for entry in ranked
        if entry.precise_bn_steps
    ]
    remarks += [
        f"{entry.title} had another list of images than {known[0].title}: their places do not compare"
        for entry in known
        if entry.data_sha != known[0].data_sha
    ]
    return "\n".join([table(rows, "><"), *faults, *remarks])


def _place(entry: Entry) -> tuple[bool, float, float]:
    return bool(entry.faults), float(np.mean(entry.steps or [np.inf])), -float(np.mean(entry.top1 or [0.0]))


def _interval(steps: Sequence[float]) -> str:
    """Write the interval of the mean of a t-distribution."""
    if len(steps) < 2:
        return "-"
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(steps) - 1) * stats.sem(steps))
    return f"{np.mean(steps) - half:,.0f} to {np.mean(steps) + half:,.0f}"


def _p_value(first: Sequence[float], second: Sequence[float]) -> str:
    # Without any spread t is a number divided by 0, and its degrees of freedom are 0 / 0: the test
    # says nothing, however far the means are apart.
    if min(len(first), len(second)) < 2 or np.ptp(first) == np.ptp(second) == 0:
        return "-"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one of them without a spread
        return f"{float(stats.ttest_ind(first, second, equal_var=False).pvalue):.1g}"
