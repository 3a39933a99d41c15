"""What is said about noise: closed forms against hand numbers, the simulation against the rules themselves."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bitfleet.launch.advise import theory as advice
from bitfleet.launch.advise.theory import (
    FlipRule,
    first_flip_ratio,
    first_ratio,
    free_flip_ratio,
    narrow_band_share,
    noise_floor,
    outlived_step,
    settled_step,
    simulate,
    window,
)
from bitfleet.optim import Bop, Bop2ndOrder, constant, linear
from bitfleet.optim.rules.bop2ndorder import Correction


def test_flips_at_threshold_0_by_hand() -> None:
    gamma, variance, found = 1e-4, 0.0, {}
    for step in range(1, 200_001):
        found[step] = free_flip_ratio(gamma, variance)
        variance = (1 - gamma) ** 2 * variance + gamma**2
    assert found[1] == 0.5
    assert found[2] == pytest.approx(0.25, rel=1e-3)  # two gradients of three: m = g1 + g2 against g1
    assert found[11] == pytest.approx(math.atan(10**-0.5) / math.pi, rel=2e-3)
    assert found[101] == pytest.approx(math.atan(0.1) / math.pi, rel=1e-2)
    assert found[200_000] == pytest.approx(math.sqrt(2 * gamma) / math.pi, rel=1e-3)  # settled
    assert math.sqrt(variance) == pytest.approx(noise_floor(gamma), rel=1e-6)


@pytest.mark.parametrize("correction", ["none", "as_coded", "adam"])
def test_simulation_is_the_rule(correction: Correction, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flips, ratios and the dead band of 200,000 weights under Bop2ndOrder; the threshold holds a good part of them."""
    monkeypatch.setattr(advice, "NUM_WEIGHTS", 50_000)
    gamma, sigma, num_steps, steps = 3e-2, 1e-2, 40, (1, 2, 5, 10, 20, 40)
    threshold = {"none": 0.05, "as_coded": 0.3, "adam": 0.1}[correction]
    torch.manual_seed(1)
    weight = nn.Parameter(torch.where(torch.randn(100_000) > 0, 1.0, -1.0))
    optimizer = Bop2ndOrder([weight], gamma=gamma, sigma=sigma, threshold=threshold, correction=correction)
    measured = measure(weight, optimizer, num_steps, 1.0)
    rule = FlipRule(gamma=constant(gamma), sigma=constant(sigma), threshold=constant(threshold), correction=correction)
    for found in simulate(rule, num_steps, steps):
        around = np.mean([measured[step] for step in window(found.step, num_steps)])
        assert found.flip_ratio == pytest.approx(around, rel=0.05, abs=0.001), found.step
    state = optimizer.state[weight]
    ratio = rule.ratio(state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(), num_steps)
    assert found.ratio_rms == pytest.approx(math.sqrt((ratio**2).mean()), rel=0.05)
    assert found.dead_band == pytest.approx((np.abs(ratio) <= threshold).mean(), abs=0.03)
    assert found.dead_band > 0.1
    assert found.second_moment == pytest.approx(float(state["exp_avg_sq"].mean()), rel=0.05)
    assert found.exp_avg_rms == pytest.approx(float(state["exp_avg"].square().mean().sqrt()), rel=0.02)


def test_simulation_of_bop_has_the_scale_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "NUM_WEIGHTS", 50_000)
    gamma, threshold, gradient, num_steps = 3e-2, 1e-4, 1e-3, 20
    torch.manual_seed(2)
    weight = nn.Parameter(torch.where(torch.randn(100_000) > 0, 1.0, -1.0))
    measured = measure(weight, Bop([weight], gamma=gamma, threshold=threshold), num_steps, gradient)
    rule = FlipRule(gamma=constant(gamma), threshold=constant(threshold))
    for found in simulate(rule, num_steps, (2, 10, 20), gradient=gradient):
        around = np.mean([measured[step] for step in window(found.step, num_steps)])
        assert found.flip_ratio == pytest.approx(around, rel=0.05, abs=0.001), found.step


def measure(
    weight: nn.Parameter, optimizer: torch.optim.Optimizer, num_steps: int, gradient: float
) -> dict[int, float]:
    """Step -> flip ratio on noise."""
    flips = {}
    for step in range(1, num_steps + 1):
        before = weight.detach().clone()
        weight.grad = gradient * torch.randn(weight.shape)
        optimizer.step()
        flips[step] = float((before != weight).float().mean())
    return flips


def test_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold as wide as the noise, moments that settle and schedules: strides of 20 steps against single ones."""
    num_steps, steps = 6000, (3000, 6000)
    rule = FlipRule(
        gamma=linear(1e-2, 1e-3, num_steps),
        sigma=linear(1e-3, 1e-2, num_steps),
        threshold=linear(0.02, 0.01, num_steps),
    )
    monkeypatch.setattr(advice, "NUM_STRIDES", 300)
    monkeypatch.setattr(advice, "NUM_WEIGHTS", 10_000)
    strided = simulate(rule, num_steps, steps)
    monkeypatch.setattr(advice, "FINE_STEPS", num_steps)
    for a, b in zip(strided, simulate(rule, num_steps, steps), strict=True):
        assert b.dead_band > 0.05
        assert a.flip_ratio == pytest.approx(b.flip_ratio, rel=0.12), a.step
        assert a.dead_band == pytest.approx(b.dead_band, abs=0.04), a.step
        assert a.ratio_rms == pytest.approx(b.ratio_rms, rel=0.05), a.step
        assert a.second_moment == pytest.approx(b.second_moment, rel=0.02), a.step
        assert a.exp_avg_rms == pytest.approx(b.exp_avg_rms, rel=0.01), a.step


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_narrow_band(width: float) -> None:
    """`width`: of the threshold, in moves of r."""
    gamma = 2e-3
    rule = FlipRule(gamma=constant(gamma), sigma=constant(1e-2), threshold=constant(width * gamma))
    found = simulate(rule, 3000, [2000, 2300, 2600, 2900])
    share = np.mean([each.flip_ratio / each.free_flip_ratio for each in found])
    assert found[0].move == pytest.approx(gamma, rel=0.1)
    assert narrow_band_share(gamma, width * gamma) == pytest.approx(share, rel=0.15)


def test_first_step() -> None:
    gamma, sigma = constant(1e-4), constant(1e-5)
    none = FlipRule(gamma=gamma, sigma=sigma, threshold=constant(1e-8))
    assert first_ratio(none, 1.0) == pytest.approx(1e-4 / math.sqrt(1e-5), rel=1e-5)
    assert first_ratio(none, 1e-10 / math.sqrt(1e-5)) == pytest.approx(
        0.5 * 1e-4 / math.sqrt(1e-5), rel=1e-3
    )  # epsilon
    assert first_flip_ratio(none, 1.0) == 0.5
    assert first_flip_ratio(FlipRule(gamma=gamma, sigma=sigma, threshold=constant(0.04)), 1.0) == 0.0
    for correction in ("as_coded", "adam"):
        rule = FlipRule(gamma=gamma, sigma=sigma, threshold=constant(0.5), correction=correction)
        assert first_ratio(rule, 1.0) == pytest.approx(1.0, rel=1e-5)
    # Bop: half of those with |gamma g| > threshold; here that is |g| > one standard deviation, 31.7 %.
    assert first_flip_ratio(FlipRule(gamma=gamma, threshold=constant(1e-7)), 1e-3) == pytest.approx(0.317 / 2, rel=1e-2)


def test_settling_and_memory_by_hand() -> None:
    assert settled_step(constant(1e-2), 1000) == 100
    assert settled_step(constant(1e-4), 1000) is None
    assert settled_step(linear(0.0, 1e-2, 100_000), 100_000) == pytest.approx(math.sqrt(2 / 1e-7), abs=6)
    assert outlived_step(constant(1e-2), 1000) == 901  # 99 steps are left
    assert outlived_step(constant(1e-4), 1000) == 1
    assert outlived_step(constant(1.0), 1000) is None
    # The memory 1 / (1e-4 (1 - t / N)) is as long as the rest, N - t = N (1 - t / N), where (1 - t / N)^2 = 1e4 / N.
    found = outlived_step(linear(1e-4, 0.0, 125_113), 125_113)
    assert found == pytest.approx(125_113 * (1 - math.sqrt(1e4 / 125_113)), abs=10)
