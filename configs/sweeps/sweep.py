"""Describe a sweep: one question, many runs that differ in a few options, and the figure that
answers it."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from bitfleet.trainer.config import TrainConfig

Label = str | float
Metric = Literal["top1", "loss", "train_loss", "flip_ratio"]
EACH_AXIS, EACH_POINT = "each axis", "each point"
SWEPT = {
    **dict.fromkeys(("--config", "--seed", "--run_dir", "--output", "--resume", "--name"), "the sweep itself sets it"),
    "--stop_after_steps": "a run that ends early would count as finished; --epochs makes all runs shorter",
}
"""Options that a run of a sweep cannot have -> the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """A combination of settings, run with every seed."""

    labels: Mapping[str, Label]
    """Axis -> value of this point. An axis that does not apply to it is left out."""
    overrides: tuple[str, ...]
    """Words of a command line: ("--optim.gamma.start", "1e-7", ...)."""

    @property
    def slug(self) -> str:
        """The labels as the name of a folder, as in "gamma-1e-07_sigma-0.001"."""
        words = [
            f"{axis}-{value if isinstance(value, str) else format(value, 'g')}" for axis, value in self.labels.items()
        ]
        return re.sub(r"[^\w.+-]+", "-", "_".join(words))


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """The pictures that `bitfleet report` draws of a sweep; sweep.json holds them."""

    bars: bool = True
    """Draw the accuracy of every point at the end, with its seeds."""
    curves: bool = True
    """Draw the curves of `metrics`, and the steps to an accuracy."""
    metrics: tuple[Metric, ...] = ("top1", "flip_ratio")
    """Metrics of the curves and grids."""
    facets: str = ""
    """Panels of the curves: "" for one, the name of an axis for one per value, "each axis" for one
    per axis with the points that differ from `centre` on it, "each point" for one per point (the
    best twelve)."""
    grids: tuple[tuple[str, str], ...] = ()
    """Pairs of axes (horizontal, vertical) to draw as a table of colours."""
    robustness: tuple[str, ...] = ()
    """Axes, with numbers as values, along which the width of the good region is measured."""
    centre: Mapping[str, Label] = dataclasses.field(default_factory=dict)
    """Labels of the point from which every other one differs on one axis; it names them and comes
    first."""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Value of an axis -> its name on the page. Default: the value."""

    @property
    def axes(self) -> set[str]:
        """The axes that it names."""
        facet = {self.facets} - {"", EACH_AXIS, EACH_POINT}
        return facet | set(self.robustness) | set(self.centre) | {axis for pair in self.grids for axis in pair}


TABLE = Figure(bars=False, curves=False)
"""No pictures: the table alone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sweep:
    """Points and seeds; every point is run with every seed.

    Raises:
        ValueError: no points or seeds, two points of the same labels, a label or a figure that is
            not on the axes, or an option that a run of a sweep cannot have.
    """

    name: str
    """Name of its file and its folder."""
    title: str
    question: str
    """The question that the runs answer, in one sentence."""
    base: str
    """The configuration that the points change."""
    axes: Mapping[str, tuple[Label, ...]]
    """Axis -> its values, both in the order of tables and legends."""
    points: tuple[Point, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    figure: Figure = Figure()

    def __post_init__(self) -> None:
        if not self.points or not self.seeds:
            raise ValueError(
                f"the sweep {self.name} needs points and seeds, and has {len(self.points)} and {len(self.seeds)}"
            )
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"the seeds of the sweep {self.name} must differ and not be negative, not {self.seeds}")
        slugs = [point.slug for point in self.points]
        if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
            raise ValueError(f"two points of the sweep {self.name} are called {twice[0]}: give them different labels")
        for point in self.points:
            if forbidden := options_of(point.overrides) & set(SWEPT):
                raise ValueError(f"the point {point.slug} sets {min(forbidden)}: leave it out: {SWEPT[min(forbidden)]}")
            if unknown := [axis for axis, value in point.labels.items() if value not in self.axes.get(axis, ())]:
                raise ValueError(
                    f"the point {point.slug} has a value of {unknown[0]} that `axes` does not list: add it"
                )
        if self.figure.facets == EACH_AXIS and not self.figure.centre:
            raise ValueError(f'the figure of the sweep {self.name} has facets="{EACH_AXIS}" and needs a `centre`')
        if missing := sorted(self.figure.axes - set(self.axes)):
            raise ValueError(
                f"the figure of the sweep {self.name} names the axis {missing[0]}; there are: {', '.join(self.axes)}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedRun:
    """Hold the run of one point with one seed."""

    point: Point
    config: TrainConfig
    """Resolved configuration, with seed and run folder."""
    words: tuple[str, ...]
    """Words of its command line, without seed and run folder."""

    @property
    def path(self) -> Path:
        """Run folder."""
        assert self.config.run_dir is not None
        return self.config.run_dir

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.path.name

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments of `bitfleet train`."""
        return (*self.words, "--seed", str(self.config.seed), "--run_dir", str(self.path), "--resume", "auto")


def constants(hyperparameter: str, value: float) -> tuple[str, ...]:
    """Return the overrides that keep a scheduled hyperparameter of the optimizer at `value`."""
    return (f"--optim.{hyperparameter}.kind", "constant", f"--optim.{hyperparameter}.start", f"{value:g}")


def options_of(words: Sequence[str]) -> set[str]:
    """Return the names of the options in a command line, with underscores for hyphens."""
    names = (word.split("=")[0] for word in words if word.startswith("--"))
    return {"--" + name[2:].replace("-", "_") for name in names}


def plan_runs(
    sweep: Sweep,
    folder: Path,
    common: Sequence[str],
    parse: Callable[[Sequence[str]], TrainConfig],
) -> list[PlannedRun]:
    """Parse every run of `sweep`, seed by seed, so that a misspelt option is found before the first
    one starts.

    Args:
        sweep: the sweep.
        folder: folder of the sweep; the runs are below it.
        common: options of all runs.
        parse: turns the words of a command line into a configuration.

    Raises:
        ValueError: an option or value does not fit, or an option is swept as well.
    """
    if forbidden := options_of(common) & set(SWEPT):
        raise ValueError(f"{min(forbidden)} cannot be passed on to the runs of a sweep: {SWEPT[min(forbidden)]}")
    parsed = []
    for point in sweep.points:
        if both := options_of(common) & options_of(point.overrides):
            raise ValueError(
                f"{min(both)} cannot be the same for all runs: the point {point.slug} of {sweep.name} sets it"
            )
        words = ["--config", sweep.base, *common, *point.overrides]
        try:
            config = parse(words)
        except ValueError as error:
            raise ValueError(f"the point {point.slug} of the sweep {sweep.name}: {error}") from error
        config = dataclasses.replace(config, run_dir=folder / "runs" / point.slug, resume="auto")
        parsed.append(PlannedRun(point, config, tuple(words)))
    return [with_seed(run, seed) for seed in sweep.seeds for run in parsed]


def with_seed(run: PlannedRun, seed: int) -> PlannedRun:
    """Return `run` with another seed, in a folder next to it."""
    run_dir = run.path.with_name(f"{run.point.slug}-seed{seed}")
    return dataclasses.replace(run, config=dataclasses.replace(run.config, seed=seed, run_dir=run_dir))


def with_threads(run: PlannedRun, threads: int) -> PlannedRun:
    """Return `run` with `threads` per rank, unless its options set them."""
    config, words = run.config, list(run.words)
    for option, given in (("--num_threads", config.num_threads), ("--data.num_threads", config.data.num_threads)):
        if given is None:
            words += [option, str(threads)]
    data = dataclasses.replace(config.data, num_threads=config.data.num_threads or threads)
    config = dataclasses.replace(config, num_threads=config.num_threads or threads, data=data)
    return dataclasses.replace(run, config=config, words=tuple(words))
