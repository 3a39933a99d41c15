import dataclasses
from pathlib import Path

import pytest

from bitfleet.configs.sweeps import available_sweeps, load_sweep
from bitfleet.configs.sweeps.sweep import plan_runs
from bitfleet.launch.parsing.arguments import parse_train
from bitfleet.optim import binary_rules

RUNS = {
    "blocks": 24,
    "cifar_length": 25,
    "cifar_precise_bn": 15,
    "cifar_precision": 18,
    "cifar_rules": 40,
    "cifar_settings": 20,
    "cifar_thresholds": 10,
    "regime": 15,
    "s511_bias_and_norm": 18,
    "s512_ablation": 39,
    "s513_pairs": 61,
    "s514_schedulers": 21,
    "s52_optimizers": 54,
    "track_bop2ndorder": 10,
    "track_latent_adam": 10,
    "track_two_ema": 10,
}


@pytest.mark.parametrize("name", available_sweeps())
def test_every_point_of_every_sweep_is_a_run(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.name == name
    runs = plan_runs(sweep, Path("f"), (), lambda words: parse_train(words, "t"))
    assert len(runs) == RUNS[name]
    distinct = {
        str((run.config.epochs, run.config.engine, run.config.optim, run.config.model, run.config.distill))
        for run in runs
    }
    assert len(distinct) == len(sweep.points)  # no two points are the same run


@pytest.mark.parametrize("base", ["binarynet_cifar10", "birealnet18_imagenet"])
def test_same_sweeps_on_the_papers_networks(base: str) -> None:
    for name in ("regime", "s511_bias_and_norm", "s514_schedulers", "s52_optimizers"):
        sweep = load_sweep(name)
        moved = dataclasses.replace(sweep, base=base, seeds=(0,))
        assert len(plan_runs(moved, Path("f"), (), lambda words: parse_train(words, "t"))) == len(sweep.points)


def test_every_rule_is_compared() -> None:
    points = load_sweep("s52_optimizers").points
    rules = {parse_train(["--config", "fashion_small", *point.overrides], "t").optim.rule for point in points}
    assert rules == set(binary_rules()) - {"real_adam"}  # whose weights stay real


def test_second_moment_is_frozen_after_a_tenth() -> None:
    (point,) = [point for point in load_sweep("regime").points if point.labels["variant"] == "frozen v"]
    sigma = parse_train(["--config", "fashion_small", *point.overrides], "t").optim.sigma.over(1000)
    assert [sigma(step) for step in (0, 99, 100, 999)] == [1e-2, 1e-2, 0.0, 0.0]


def test_staircase_has_the_papers_three_drops() -> None:
    (point,) = [p for p in load_sweep("s514_schedulers").points if p.slug == "scheduled-gamma_schedule-staircase"]
    gamma = parse_train(["--config", "binarynet_cifar10", *point.overrides], "t").optim.gamma.over(350_000)
    assert [gamma(epoch * 1000) for epoch in (0, 99, 101, 201, 301, 349)] == pytest.approx(
        [1e-7, 1e-7, 1e-8, 1e-9, 1e-10, 1e-10]
    )


def test_misspelt_sweep_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="'s512'.*'s512_ablation'"):
        load_sweep("s512")
