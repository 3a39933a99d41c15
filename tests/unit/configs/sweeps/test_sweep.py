import dataclasses
from pathlib import Path

import pytest

from bitfleet.configs.sweeps.sweep import (
    EACH_AXIS,
    EACH_POINT,
    Figure,
    PlannedRun,
    Point,
    Sweep,
    constants,
    plan_runs,
    with_seed,
    with_threads,
)
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.trainer.config import TrainConfig


def parse(words: list[str] | tuple[str, ...]) -> TrainConfig:
    return parse_train(words, "t")


def make(*points: Point, seeds: tuple[int, ...] = (0, 1)) -> Sweep:
    values = {axis: tuple(p.labels[axis] for p in points if axis in p.labels) for axis in ("gamma", "norm", "a")}
    return Sweep("s", "Title", "Question?", "fashion_small", values, points, seeds)


A = Point({"gamma": 1e-7, "norm": "batch norm/x"}, constants("gamma", 1e-7))
B = Point({"gamma": 1e-3}, constants("gamma", 1e-3))


def plan(sweep: Sweep, *common: str, threads: int = 1) -> list[PlannedRun]:
    return [with_threads(run, threads) for run in plan_runs(sweep, Path("f"), common, parse)]


def test_every_point_with_every_seed_all_points_of_a_seed_together() -> None:
    runs = plan(make(A, B), "--epochs", "3")
    assert [run.name for run in runs] == [
        "gamma-1e-07_norm-batch-norm-x-seed0",
        "gamma-0.001-seed0",
        "gamma-1e-07_norm-batch-norm-x-seed1",
        "gamma-0.001-seed1",
    ]
    assert [(run.config.seed, run.config.optim.gamma(5)) for run in runs] == [
        (0, 1e-7),
        (0, 1e-3),
        (1, 1e-7),
        (1, 1e-3),
    ]
    for run in runs:
        assert run.config.epochs == 3
        assert parse(run.arguments) == run.config  # what is compared and written is what is run


def test_threads_are_set_where_they_are_open() -> None:
    (run,) = plan(make(A, seeds=(0,)), "--num_threads", "3", threads=2)
    assert (run.config.num_threads, run.config.data.num_threads) == (3, 2)
    assert parse(run.arguments) == run.config


def test_another_seed_has_a_folder_of_its_own() -> None:
    first, other = plan(make(A))
    assert with_seed(first, 1) == other
    assert first.path == Path("f/runs/gamma-1e-07_norm-batch-norm-x-seed0")


def test_figure_names_only_axes_of_the_sweep() -> None:
    with pytest.raises(ValueError, match="sweep s .*sigma"):
        dataclasses.replace(make(A, B), figure=Figure(grids=(("gamma", "sigma"),)))
    with pytest.raises(ValueError, match="each axis.*`centre`"):
        dataclasses.replace(make(A, B), figure=Figure(facets=EACH_AXIS))
    assert dataclasses.replace(make(A, B), figure=Figure(facets=EACH_POINT)).figure.axes == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": (A, A)}, "sweep s .*gamma-1e-07_norm-batch-norm-x"),
        ({"points": ()}, "0 and 2"),
        ({"seeds": (1, 1)}, r"seeds .*\(1, 1\)"),
        ({"points": (Point({"a": 1}, ("--run-dir", "x")),)}, "a-1 .*--run_dir"),
        ({"points": (Point({"gamma": 2.0}, ()),)}, "gamma-2 .*`axes`"),
    ],
)
def test_sweep_that_cannot_be(change: dict[str, tuple[Point, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(A), **change)  # type: ignore[arg-type]


def test_misspelt_point_is_found_before_anything_starts() -> None:
    bad = Point({"gamma": 1.0}, ("--optim.gama.start", "1"))
    with pytest.raises(ValueError, match=r"gamma-1 .*--optim.gama.start.*--optim.gamma.start"):
        plan(make(A, bad))


def test_option_that_is_swept_cannot_be_common() -> None:
    with pytest.raises(ValueError, match=r"--optim.gamma.start .*gamma-1e-07"):
        plan(make(A), "--optim.gamma.start=1e-5")
    with pytest.raises(ValueError, match="--seed "):
        plan(make(A), "--seed", "3")


def test_runs_of_a_sweep_go_to_their_end() -> None:
    with pytest.raises(ValueError, match="--stop_after_steps "):
        plan(make(A), "--stop-after-steps=3")
    with pytest.raises(ValueError, match="a-1 .*--stop_after_steps"):
        make(Point({"a": 1}, ("--stop_after_steps", "3")))
