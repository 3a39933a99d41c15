"""Advice on the rules whose flips are not predicted: the lines there are, and that their arithmetic is that of the rules."""

import dataclasses
import math

import pytest
import torch

from bitfleet.configs import load_config
from bitfleet.launch.advise.advice import ADVICE, advise
from bitfleet.launch.advise.gradient import Gradient
from bitfleet.launch.advise.latent import first_sizes
from bitfleet.launch.advise.outlook import Line, make_outlook
from bitfleet.optim import OptimConfig, binary_rules, constant, linear, with_rule
from bitfleet.optim.rules.bnew import bnew_step_, phase_schedules
from bitfleet.optim.rules.diode import FIRST_LIMIT, diode_step_
from bitfleet.optim.rules.latent import latent_adam_step_, latent_sgd_step_
from bitfleet.optim.rules.sgdat import sgdat_step_
from bitfleet.optim.transitions import TransitionConfig

SMALL = load_config("fashion_quickstart")
GRADIENT = Gradient(1e-4, 1e-5, "last", 1e-3, "first", 8, "of nothing")
NUM_STEPS = 1104
LINES = {
    "bop2ndorder": {"flips at step 1", "memory 1/gamma", "memory 1/sigma"},
    "bop": {"flips at step 1", "memory 1/gamma"},
    "latent_adam": {"steps to the other sign", "latent_lr at the end"},
    "latent_sgd": {"steps to the other sign", "latent_lr at the end"},
    "two_ema": {"size of gamma", "memory 1/gamma", "memory 1/alpha"},
    "sgdat": {"growth of the threshold", "latent_lr at the end"},
    "diode": {"memory 1/gamma", "memory 1/alpha", "can flip in the run"},
    "bnew": {"steps to the other sign", "growth by rho", "weights are frozen"},
}


def lines_of(rule: str, gradient: Gradient | None = GRADIENT, **changes: object) -> dict[str, Line]:
    optim = dataclasses.replace(OptimConfig(rule=rule), **changes)  # type: ignore[arg-type]
    found = advise(make_outlook(dataclasses.replace(SMALL, optim=optim), 6000, gradient))
    assert len({line.quantity for line in found}) == len(found)
    return {line.quantity: line for line in found}


@pytest.mark.parametrize("rule", binary_rules())
def test_every_rule_has_its_lines(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfleet.launch.advise.theory.FINE_STEPS", 20)
    assert ADVICE.keys() == binary_rules().keys()
    for gradient in (GRADIENT, None):
        found = lines_of(rule, gradient)
        assert LINES[rule] <= found.keys()
        assert "schedule of lr" in found


def test_gamma_of_bop2ndorder_is_none_of_two_ema() -> None:
    kept = with_rule(SMALL.optim, "two_ema").gamma
    assert kept == SMALL.optim.gamma
    line = lines_of("two_ema", gamma=kept)["size of gamma"]
    assert (line.value, line.verdict) == ("0.0003", "look")
    assert "gamma is usually 0.1" in line.why
    assert lines_of("two_ema")["size of gamma"].verdict == "ok"
    alpha = lines_of("two_ema", alpha=linear(0.0, 1e-3))["memory 1/alpha"]
    assert alpha.value.startswith("endless -> 1,0")


def test_latent_weights_cross_0_when_adam_takes_them_there() -> None:
    sizes = first_sizes(SMALL)
    assert sizes is not None
    found = lines_of("latent_adam")
    latent, exp_avg, exp_avg_sq, weight = torch.full((1,), sizes.mean), torch.zeros(1), torch.zeros(1), torch.ones(1)
    steps = 0
    while weight > 0:
        steps += 1
        step = torch.tensor(float(steps))
        latent_adam_step_(weight, torch.ones(1), latent, exp_avg, exp_avg_sq, latent_lr=1e-3, step=step)
    line = found["steps to the other sign"]
    assert line.value.startswith(f"{steps} agreeing, {math.ceil((sizes.mean / 1e-3) ** 2)} of noise")
    assert line.verdict == "ok"
    assert found["latent_lr at the end"].verdict == "look"
    assert lines_of("latent_adam", latent_lr=linear(1e-3, 0.0))["latent_lr at the end"].verdict == "ok"


@pytest.mark.parametrize(("latent_lr", "verdict"), [(1e-6, "wrong"), (1e-4, "look"), (1e-3, "ok"), (1e-1, "look")])
def test_learning_rates_of_latent_adam(latent_lr: float, verdict: str) -> None:
    assert lines_of("latent_adam", latent_lr=constant(latent_lr))["steps to the other sign"].verdict == verdict


def test_latent_sgd_sums_gradients_up() -> None:
    sizes = first_sizes(SMALL)
    assert sizes is not None
    latent, momentum_buffer, weight = torch.full((1,), sizes.mean), torch.zeros(1), torch.ones(1)
    steps = 0
    while weight > 0:
        steps += 1
        latent_sgd_step_(weight, torch.full((1,), 1e-4), latent, momentum_buffer, latent_lr=0.1, momentum=0.9)
    found = int(lines_of("latent_sgd")["steps to the other sign"].value.split()[0])
    assert found == pytest.approx(steps, abs=10)  # momentum takes its time to sum up
    assert lines_of("latent_sgd", None)["steps to the other sign"].value == "unknown"


@pytest.mark.parametrize("rule", sorted(ADVICE.keys() - {"bop", "bop2ndorder"}))
def test_twice_the_batch_is_as_far_in_half_of_the_steps(rule: str) -> None:
    line = lines_of(rule)["at twice the batch"]
    assert line.verdict == "ok"
    optim = OptimConfig(rule=rule)  # type: ignore[arg-type]
    said = dict(part.split() for part in line.value.split(", "))
    for name, value in said.items():
        now = getattr(optim, name)
        assert float(value) == pytest.approx(2 * (now if isinstance(now, float) else now.over(NUM_STEPS)(0)), rel=1e-2)
    assert said.keys() == {
        "two_ema": {"gamma", "alpha"},
        "diode": {"gamma", "alpha"},
        "bnew": {"latent_lr", "rho"},
    }.get(rule, {"latent_lr"})


def test_controller_sees_to_the_end_of_the_learning_rate() -> None:
    found = lines_of("latent_adam", transitions=TransitionConfig(drives="latent_lr"))
    assert found["latent_lr is driven"].verdict == "look"
    assert found["schedule of latent_lr"].why == "driven from here"
    assert "latent_lr at the end" not in found


def test_share_that_diode_can_flip() -> None:
    e2 = -FIRST_LIMIT * (torch.arange(1000) + 0.5) / 1000
    weight, exp_avg = torch.ones(1000), torch.zeros(1000)
    for _ in range(NUM_STEPS):
        diode_step_(weight, torch.ones(1000), exp_avg, e2, gamma=1e-2, alpha=1e-4, latent_lr=1e-3)
    share = (weight < 0).float().mean().item()
    line = lines_of("diode")["can flip in the run"]
    assert line.value == f"{100 * share:.0f} % of the weights"
    assert line.verdict == "look"
    assert lines_of("diode", alpha=constant(1e-3))["can flip in the run"].verdict == "ok"  # half of them by step 406
    assert lines_of("diode", alpha=constant(1e-2))["can flip in the run"].value == "100 % of the weights"
    assert lines_of("diode", alpha=constant(1e-2))["can flip in the run"].verdict == "ok"
    assert lines_of("diode", alpha=constant(1.0))["can flip in the run"].verdict == "ok"
    assert lines_of("diode", alpha=constant(1e-6))["can flip in the run"].verdict == "wrong"


def flips_of_sgdat(threshold: float) -> float:
    """A mean over weights, with gradients of noise."""
    generator = torch.Generator().manual_seed(0)
    weight, accumulator, num_flips = torch.ones(200), torch.zeros(200), torch.zeros(200)
    for _ in range(NUM_STEPS):
        grad = GRADIENT.rms * torch.randn(200, generator=generator)
        sgdat_step_(weight, grad, accumulator, num_flips, latent_lr=1e-4, threshold=threshold)
    return num_flips.mean().item()


def test_threshold_of_sgdat_beside_its_accumulator() -> None:
    free = lines_of("sgdat", threshold=constant(1e-12))["growth of the threshold"]
    assert free.verdict == "look"
    assert f"would have flipped {flips_of_sgdat(0.0):.0f} times" in free.why
    stuck = lines_of("sgdat", threshold=constant(1e-4))["growth of the threshold"]
    assert stuck.verdict == "wrong"
    assert flips_of_sgdat(1e-4) < 1.0  # half of the weights begin with the sign that they get
    assert lines_of("sgdat", threshold=constant(1e-8))["growth of the threshold"].verdict == "ok"
    assert 1.0 < flips_of_sgdat(1e-8) < flips_of_sgdat(0.0)


def test_growth_of_bnew_is_that_of_its_steps() -> None:
    config = OptimConfig(rule="bnew", rho=3e-3)
    rho = phase_schedules(config.hyperparameters, 1125)["rho"]
    weight, zeros = torch.full((1,), 1e-4), torch.zeros(1)
    for step in range(1068):  # 0.95 of 1,125
        bnew_step_(
            weight, zeros, zeros.clone(), zeros.clone(), latent_lr=0.0, rho=rho(step), step=torch.tensor(step + 1.0)
        )
    found = lines_of("bnew", rho=3e-3)
    assert found["growth by rho"].value == f"x {weight.item() / 1e-4:.2g}"
    assert found["growth by rho"].verdict == "look"
    assert lines_of("bnew", rho=1e-2)["growth by rho"].verdict == "ok"
    frozen = found["weights are frozen"]
    assert (frozen.value, frozen.verdict) == ("from step 1,069", "look")
    assert "36 steps that are left" in frozen.why
    assert lines_of("bnew", frozen_from=0.9)["weights are frozen"].verdict == "ok"
