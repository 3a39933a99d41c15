"""A sweep: one question, asked of many runs that differ in a few options."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bitfleet.trainer.config import TrainConfig

Label = str | float
SWEPT = {
    **dict.fromkeys(("--config", "--seed", "--run_dir", "--output", "--resume", "--name"), "the sweep itself sets it"),
    "--stop_after_steps": "a run that ends before its end would count as finished; --epochs makes all runs shorter",
}
"""Options that no run of a sweep is given -> why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One place on the axes of a sweep."""

    labels: Mapping[str, Label]
    """Axis -> the value of this point; axes that do not concern it are left out."""
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
class Sweep:
    """Points and seeds; every point is run with every seed.

    Raises:
        ValueError: no points or seeds, two points of the same labels, or an option that a run of a sweep must not have.
    """

    name: str
    """Of its file and its folder."""
    title: str
    question: str
    """What the runs shall answer, in one sentence."""
    base: str
    """The configuration that the points change."""
    points: tuple[Point, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

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
            if own := options_of(point.overrides) & set(SWEPT):
                raise ValueError(f"the point {point.slug} sets {min(own)}: leave it out: {SWEPT[min(own)]}")

    @property
    def axes(self) -> dict[str, list[Label]]:
        """Axis -> its values, both in the order of the points."""
        found: dict[str, list[Label]] = {}
        for point in self.points:
            for axis, value in point.labels.items():
                if value not in found.setdefault(axis, []):
                    found[axis].append(value)
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedRun:
    """One point with one seed."""

    point: Point
    config: TrainConfig
    """Resolved, with seed and run folder."""
    words: tuple[str, ...]
    """Of its command line, without seed and run folder."""

    @property
    def path(self) -> Path:
        """Its folder."""
        assert self.config.run_dir is not None
        return self.config.run_dir

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.path.name

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of `bitfleet train`."""
        return (*self.words, "--seed", str(self.config.seed), "--run_dir", str(self.path), "--resume", "auto")


def held(hyperparameter: str, value: float) -> tuple[str, ...]:
    """The overrides that hold gamma, sigma, threshold or lr of the optimizer at `value`."""
    return (f"--optim.{hyperparameter}.kind", "constant", f"--optim.{hyperparameter}.start", f"{value:g}")


def options_of(words: Sequence[str]) -> set[str]:
    """The names of the options in the words of a command line, underscores for hyphens."""
    names = (word.split("=")[0] for word in words if word.startswith("--"))
    return {"--" + name[2:].replace("-", "_") for name in names}


def plan_runs(
    sweep: Sweep,
    folder: Path,
    common: Sequence[str],
    parse: Callable[[Sequence[str]], TrainConfig],
) -> list[PlannedRun]:
    """Every run of `sweep`, parsed: what is misspelt is found before the first one starts. All points of a seed come together.

    Args:
        sweep: the sweep.
        folder: its own; the runs are below it.
        common: options of all runs.
        parse: from words to a configuration.

    Raises:
        ValueError: an option or value that does not fit, or one that is swept as well.
    """
    if own := options_of(common) & set(SWEPT):
        raise ValueError(f"{min(own)} cannot be passed on to the runs of a sweep: {SWEPT[min(own)]}")
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
    """`run` with another seed, in a folder beside its own."""
    run_dir = run.path.with_name(f"{run.point.slug}-seed{seed}")
    return dataclasses.replace(run, config=dataclasses.replace(run.config, seed=seed, run_dir=run_dir))


def with_threads(run: PlannedRun, threads: int) -> PlannedRun:
    """`run` with `threads` of a rank, where its options do not say how many."""
    config, words = run.config, list(run.words)
    for option, given in (("--num_threads", config.num_threads), ("--data.num_threads", config.data.num_threads)):
        if given is None:
            words += [option, str(threads)]
    data = dataclasses.replace(config.data, num_threads=config.data.num_threads or threads)
    config = dataclasses.replace(config, num_threads=config.num_threads or threads, data=data)
    return dataclasses.replace(run, config=config, words=tuple(words))
