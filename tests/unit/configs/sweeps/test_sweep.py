import dataclasses
from pathlib import Path

import pytest

from bitfleet.configs.sweeps.sweep import PlannedRun, Point, Sweep, held, plan_runs, with_seed, with_threads
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.trainer.config import TrainConfig


def parse(words: list[str] | tuple[str, ...]) -> TrainConfig:
    return parse_train(words, "t")


def make(*points: Point, seeds: tuple[int, ...] = (0, 1)) -> Sweep:
    return Sweep("s", "Title", "Question?", "fashion_small", points, seeds)


A = Point({"gamma": 1e-7, "norm": "batch norm/x"}, held("gamma", 1e-7))
B = Point({"gamma": 1e-3}, held("gamma", 1e-3))


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


def test_axes_keep_the_order_of_the_points() -> None:
    assert make(B, A).axes == {"gamma": [1e-3, 1e-7], "norm": ["batch norm/x"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": (A, A)}, "two points of the sweep s are called gamma-1e-07_norm-batch-norm-x"),
        ({"points": ()}, "needs points and seeds, and has 0 and 2"),
        ({"seeds": (1, 1)}, r"must differ and not be negative, not \(1, 1\)"),
        ({"points": (Point({"a": 1}, ("--run-dir", "x")),)}, "the point a-1 sets --run_dir"),
    ],
)
def test_sweep_that_cannot_be(change: dict[str, tuple[Point, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(A), **change)  # type: ignore[arg-type]


def test_misspelt_point_is_found_before_anything_starts() -> None:
    bad = Point({"gamma": 1.0}, ("--optim.gama.start", "1"))
    with pytest.raises(
        ValueError, match=r"point gamma-1 of the sweep s: there is no option --optim.gama.start; did you mean"
    ):
        plan(make(A, bad))


def test_option_that_is_swept_cannot_be_common() -> None:
    with pytest.raises(ValueError, match=r"--optim.gamma.start cannot be the same for all runs: the point gamma-1e-07"):
        plan(make(A), "--optim.gamma.start=1e-5")
    with pytest.raises(ValueError, match="--seed cannot be passed on to the runs of a sweep: the sweep itself sets it"):
        plan(make(A), "--seed", "3")


def test_runs_of_a_sweep_go_to_their_end() -> None:
    with pytest.raises(ValueError, match="--stop_after_steps cannot be passed on .*would count as finished"):
        plan(make(A), "--stop-after-steps=3")
    with pytest.raises(ValueError, match="the point a-1 sets --stop_after_steps"):
        make(Point({"a": 1}, ("--stop_after_steps", "3")))
