"""Predictions for noise: closed forms against simulations, simulations against the rules."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bitfleet.launch.advise import theory
from bitfleet.launch.advise.theory import (
    FlipRule,
    band_share,
    outlived_step,
    predict,
    settled_step,
    simulate,
    window,
)
from bitfleet.optim import Bop, Bop2ndOrder, constant, linear
from bitfleet.optim.kernels.kernels import Correction


def test_flips_at_threshold_0_by_hand() -> None:
    rule = FlipRule(gamma=constant(1e-4), threshold=constant(0.0))
    snapshots = predict(rule, 200_000, (1, 2, 11, 101, 200_000))
    free = {step: snapshot.free_flip_ratio for step, snapshot in snapshots.items()}
    assert free[1] == 0.5
    assert free[2] == pytest.approx(0.25, rel=1e-3)  # two gradients of three: m = g1 + g2 against g1
    assert free[11] == pytest.approx(math.atan(10**-0.5) / math.pi, rel=2e-3)
    assert free[101] == pytest.approx(math.atan(0.1) / math.pi, rel=1e-2)
    assert free[200_000] == pytest.approx(math.sqrt(2e-4) / math.pi, rel=1e-3)  # settled
    assert snapshots[200_000].exp_avg_rms == pytest.approx(math.sqrt(1e-4 / (2 - 1e-4)), rel=1e-6)
    assert snapshots[200_000].flip_ratio == free[200_000]


@pytest.mark.parametrize("correction", ["none", "as_coded", "adam"])
def test_prediction_is_the_rule(correction: Correction, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 weights under Bop2ndOrder; the threshold holds a good part of them."""
    monkeypatch.setattr(theory, "NUM_WEIGHTS", 100_000)
    gamma, sigma, num_steps, steps = 3e-2, 1e-2, 40, (1, 2, 5, 10, 20, 40)
    threshold = {"none": 0.05, "as_coded": 0.3, "adam": 0.1}[correction]
    torch.manual_seed(1)
    weight = nn.Parameter(torch.where(torch.randn(100_000) > 0, 1.0, -1.0))
    optimizer = Bop2ndOrder([weight], gamma=gamma, sigma=sigma, threshold=threshold, correction=correction)
    measured = measure(weight, optimizer, num_steps, 1.0)
    rule = FlipRule(gamma=constant(gamma), sigma=constant(sigma), threshold=constant(threshold), correction=correction)
    snapshots = predict(rule, num_steps, steps)
    for step, snapshot in snapshots.items():
        around = np.mean([measured[near] for near in window(step, num_steps)])
        assert snapshot.flip_ratio == pytest.approx(around, rel=0.05, abs=0.001), step
    state, last = optimizer.state[weight], snapshots[num_steps]
    ratio = rule.ratio(state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(), num_steps)
    assert last.ratio_rms == pytest.approx(math.sqrt((ratio**2).mean()), rel=0.05)
    assert last.dead_band == pytest.approx((np.abs(ratio) <= threshold).mean(), abs=0.03)
    assert last.dead_band > 0.1
    assert last.second_moment == pytest.approx(float(state["exp_avg_sq"].mean()), rel=0.05)
    assert last.exp_avg_rms == pytest.approx(float(state["exp_avg"].square().mean().sqrt()), rel=0.02)


def test_prediction_of_bop_has_the_scale_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "NUM_WEIGHTS", 100_000)
    gamma, threshold, gradient, num_steps = 3e-2, 1e-4, 1e-3, 20
    torch.manual_seed(2)
    weight = nn.Parameter(torch.where(torch.randn(100_000) > 0, 1.0, -1.0))
    measured = measure(weight, Bop([weight], gamma=gamma, threshold=threshold), num_steps, gradient)
    rule = FlipRule(gamma=constant(gamma), threshold=constant(threshold))
    for step, snapshot in predict(rule, num_steps, (2, 10, 20), gradient=gradient).items():
        around = np.mean([measured[near] for near in window(step, num_steps)])
        assert snapshot.flip_ratio == pytest.approx(around, rel=0.05, abs=0.001), step


def measure(
    weight: nn.Parameter, optimizer: torch.optim.Optimizer, num_steps: int, gradient: float
) -> dict[int, float]:
    """Return step -> flip ratio on noise."""
    flips = {}
    for step in range(1, num_steps + 1):
        before = weight.detach().clone()
        weight.grad = gradient * torch.randn(weight.shape)
        optimizer.step()
        flips[step] = float((before != weight).float().mean())
    return flips


def test_closed_form_is_the_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold as wide as the noise, moments that settle, and schedules."""
    num_steps, steps = 6000, (300, 1000, 3000, 6000)
    rule = FlipRule(
        gamma=linear(1e-2, 1e-3, num_steps),
        sigma=linear(1e-3, 1e-2, num_steps),
        threshold=linear(0.02, 0.01, num_steps),
    )
    monkeypatch.setattr(theory, "NUM_WEIGHTS", 5000)
    simulated = simulate(rule, num_steps)
    for step in steps:
        around = window(step, num_steps)  # at the end of the run to one side only
        snapshots = list(predict(rule, num_steps, around).values())
        flips, bands = np.mean([simulated[at - 1] for at in around], axis=0)
        assert snapshots[0].dead_band > 0.05
        assert np.mean([snapshot.flip_ratio for snapshot in snapshots]) == pytest.approx(flips, rel=0.12), step
        assert np.mean([snapshot.dead_band for snapshot in snapshots]) == pytest.approx(bands, abs=0.04), step


@pytest.mark.parametrize("width", [0.5, 2.0, 8.0])
def test_thresholds_near_the_step_of_r(width: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """`width` is that of the threshold, in steps of r."""
    monkeypatch.setattr(theory, "NUM_WEIGHTS", 5000)
    gamma = 2e-3
    rule = FlipRule(gamma=constant(gamma), sigma=constant(1e-2), threshold=constant(width * gamma))
    simulated = simulate(rule, 2000)
    (snapshot,) = predict(rule, 2000, [1900]).values()
    assert snapshot.move == pytest.approx(gamma, rel=0.1)
    assert snapshot.flip_ratio == pytest.approx(np.mean([flips for flips, _ in simulated[1500:]]), rel=0.15)
    share = band_share(snapshot.move, width * gamma, snapshot.ratio_rms)
    assert snapshot.flip_ratio == pytest.approx(share * snapshot.free_flip_ratio)


def test_first_step() -> None:
    rates = {"gamma": constant(1e-4), "sigma": constant(1e-5)}
    (none,) = predict(FlipRule(**rates, threshold=constant(1e-8)), 9, [1]).values()
    assert none.ratio_rms == pytest.approx(1e-4 / math.sqrt(1e-5), rel=1e-5)
    assert none.flip_ratio == pytest.approx(0.5, abs=0.01)
    epsilon = predict(FlipRule(**rates, threshold=constant(1e-8)), 9, [1], gradient=1e-10 / math.sqrt(1e-5))[1]
    assert epsilon.ratio_rms == pytest.approx(0.5 * none.ratio_rms, rel=1e-3)
    held = predict(FlipRule(**rates, threshold=constant(0.04)), 9, [1])[1]
    assert (held.flip_ratio, held.dead_band) == (0.0, 1.0)
    for correction in ("as_coded", "adam"):
        rule = FlipRule(**rates, threshold=constant(0.5), correction=correction)
        assert predict(rule, 9, [1])[1].ratio_rms == pytest.approx(1.0, rel=1e-5)
    # Bop: half of the weights with |gamma g| > threshold, which is one standard deviation: 31.7 %.
    bop = FlipRule(gamma=rates["gamma"], threshold=constant(1e-7))
    assert predict(bop, 9, [1], gradient=1e-3)[1].flip_ratio == pytest.approx(0.317 / 2, abs=0.01)


def test_gamma_of_0_flips_nothing() -> None:
    rule = FlipRule(gamma=constant(0.0), sigma=constant(1e-2), threshold=constant(0.0))
    for snapshot in predict(rule, 500, (1, 500)).values():
        assert (snapshot.flip_ratio, snapshot.free_flip_ratio, snapshot.move) == (0.0, 0.0, 0.0)


def test_settling_and_memory_by_hand() -> None:
    assert settled_step(constant(1e-2), 1000) == 100
    assert settled_step(constant(1e-4), 1000) is None
    assert settled_step(linear(0.0, 1e-2, 100_000), 100_000) == pytest.approx(math.sqrt(2 / 1e-7), abs=6)
    assert outlived_step(constant(1e-2), 1000) == 901  # 99 steps are left
    assert outlived_step(constant(1e-4), 1000) == 1
    assert outlived_step(constant(1.0), 1000) is None
    # The memory 1 / (1e-4 (1 - t / N)) equals the rest N (1 - t / N) at (1 - t / N)^2 = 1e4 / N.
    outlived = outlived_step(linear(1e-4, 0.0, 125_113), 125_113)
    assert outlived == pytest.approx(125_113 * (1 - math.sqrt(1e4 / 125_113)), abs=10)
