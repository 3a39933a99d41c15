"""State for weights from a file: nothing flips at once, and what is averaged is what noise would
have left."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.optim import RoutedOptimizer, Schedule, Seeding, ShardedOptimizer
from bitfleet.optim.rules.adam import KERAS_DEFAULTS

RULES: dict[str, dict[str, Any]] = {
    "bop": {"gamma": 1e-3, "threshold": 1e-8},
    "bop2ndorder": {"gamma": 1e-3, "sigma": 1e-2, "threshold": 1e-6, "correction": "none"},
    "bop2ndorder as_coded": {"gamma": 1e-3, "sigma": 1e-2, "threshold": 1e-6, "correction": "as_coded"},
    "bop2ndorder adam": {"gamma": 1e-3, "sigma": 1e-2, "threshold": 1e-6, "correction": "adam"},
    "two_ema": {"gamma": 0.1, "alpha": 1e-3},
    "sgdat": {"latent_lr": 1e-4, "threshold": 1e-7},
    "diode": {"gamma": 1e-2, "alpha": 1e-4, "latent_lr": 1e-3, "seed": 1},
    "latent_sgd": {"latent_lr": 0.1, "momentum": 0.9, "seed": 1},
    "latent_adam": {"latent_lr": 1e-3, "seed": 1},
}
INERTIA, NUM_STEPS = 0.4, 200


def make(rule: str) -> tuple[nn.Parameter, nn.Parameter, ShardedOptimizer]:
    generator = torch.Generator().manual_seed(0)
    binary = nn.Parameter(torch.randn(64, 32, 3, 3, generator=generator).sign())
    real = nn.Parameter(torch.randn(99, generator=generator))
    groups = [
        {"params": [("b", binary)], "rule": rule.split()[0], **RULES[rule]},
        {"params": [("r", real)], "rule": "keras_adam", **KERAS_DEFAULTS, "lr": 0.01},
    ]
    return binary, real, ShardedOptimizer(RoutedOptimizer(groups))


def backward(params: tuple[nn.Parameter, ...], step: int, factor: float = 1.0) -> list[Tensor]:
    """Gradients of noise whose size differs from weight to weight."""
    generator = torch.Generator().manual_seed(step)
    sizes = [torch.linspace(0.001, 0.02, p.numel()).view(p.shape) for p in params]
    grads = [factor * size * torch.randn(size.shape, generator=generator) for size in sizes]
    torch.stack([(param * grad).sum() for param, grad in zip(params, grads, strict=True)]).sum().backward()
    return grads


@pytest.mark.parametrize("rule", RULES)
def test_first_step_flips_next_to_nothing(rule: str) -> None:
    binary, real, sharded = make(rule)
    before, real_before = binary.detach().clone(), real.detach().clone()
    seeding = Seeding(sharded, inertia=INERTIA, num_steps=NUM_STEPS, schedules={})
    for step in range(8):
        backward((binary, real), step)
        assert seeding.take()
    seeding.finish()
    assert torch.equal(binary, before)
    assert torch.equal(real, real_before)
    assert sharded.steps() == {"b": 0, "r": 8}
    for step in range(8, 11):
        backward((binary, real), step)
        sharded.step()
        assert (binary != before).float().mean() < 0.01
    assert sharded.num_steps == 3
    # A weight whose gradients say so does flip.
    for _ in range(3000 if rule == "diode" else 500):
        torch.autograd.backward(0.1 * (binary * before).sum())
        real.grad = None
        sharded.step()
    assert (binary != before).float().mean() > 0.5
    sharded.close()


def test_moments_are_those_of_the_gradients() -> None:
    binary, real, sharded = make("bop2ndorder")
    seeding = Seeding(sharded, inertia=INERTIA, num_steps=NUM_STEPS, schedules={})
    squares, twin = torch.zeros_like(binary), nn.Parameter(real.detach().clone())
    adam = RoutedOptimizer([twin], {"rule": "keras_adam", **KERAS_DEFAULTS, "lr": 0.0})
    for step in range(8):
        grad, twin.grad = backward((binary, real), step)
        squares += grad.square()
        seeding.take()
        adam.step()
    seeding.finish()
    state = sharded.gather_state()
    assert torch.equal(state["b"]["exp_avg_sq"], squares / 8)
    expected = -INERTIA * math.sqrt(1e-3 / 2) * binary.detach() * (squares / 8).sqrt()
    torch.testing.assert_close(state["b"]["exp_avg"], expected)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(state["r"][key], adam.state[twin][key])
    sharded.close()


@pytest.mark.parametrize("rule", ["latent_adam", "latent_sgd"])
def test_latent_weights_of_a_file_stay(rule: str) -> None:
    binary, real, sharded = make(rule)
    values = torch.linspace(-0.9, 0.9, binary.numel() // 2).view(32, 32, 3, 3)
    with torch.no_grad():
        binary[:32] = values
    sharded.read_weights()
    sharded.start_signs()
    started = sharded.gather_state()["b"]["latent"]
    assert torch.equal(started[:32], values)
    seeding = Seeding(sharded, inertia=INERTIA, num_steps=NUM_STEPS, schedules={})
    backward((binary, real), 0)
    seeding.take()
    seeding.finish()
    assert torch.equal(sharded.gather_state()["b"]["latent"], started)
    sharded.close()


@pytest.mark.parametrize("rule", ["bop", "diode", "latent_adam"])
def test_state_during_a_warm_up_is_that_of_what_follows(rule: str) -> None:
    def seeded(schedule: Schedule) -> dict[str, Tensor]:
        binary, real, sharded = make(rule)
        key = next(key for key in ("gamma", "latent_lr") if key in RULES[rule])
        group = sharded.param_groups[0]
        group |= {"name": "binary", key: schedule(0)}
        seeding = Seeding(sharded, inertia=INERTIA, num_steps=NUM_STEPS, schedules={"binary": {key: schedule}})
        backward((binary, real), 0)
        seeding.take()
        seeding.finish()
        sharded.close()
        return sharded.gather_state()["b"]

    expected = seeded(Schedule(start=1e-3))
    assert any(bool(value.any()) for value in expected.values())
    warm = [
        Schedule(start=1e-3, kind="warmup_cosine", warmup_steps=9, num_steps=99),
        Schedule(start=1e-3, kind="polynomial", warmup_steps=9, num_steps=99),
    ]
    for schedule in warm:
        found = seeded(schedule)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_gradients_that_are_not_finite_are_left_out() -> None:
    binary, real, sharded = make("bop2ndorder")
    seeding = Seeding(sharded, inertia=INERTIA, num_steps=NUM_STEPS, schedules={})
    backward((binary, real), 0, factor=math.inf)
    assert not seeding.take()
    assert seeding.num_taken == 0
    with pytest.raises(ValueError, match=r"after 0 steps .* take\(\)"):
        seeding.finish()
    grad, _ = backward((binary, real), 1)
    assert seeding.take()
    seeding.finish()
    assert torch.equal(sharded.gather_state()["b"]["exp_avg_sq"], grad.square())
    sharded.close()


def test_state_of_a_run_saved_before_its_first_update_is_not_made_anew() -> None:
    binary, real, sharded = make("latent_adam")
    seeding = Seeding(sharded, inertia=INERTIA, num_steps=NUM_STEPS, schedules={})
    backward((binary, real), 0)
    seeding.take()
    seeding.finish()
    saved = {key: value.clone() for key, value in sharded.state_dict()["shard"].items()}
    latent = sharded.gather_state()["b"]["latent"].clone()
    other_binary, other_real, other = make("latent_adam")
    other.load_state_dict({**sharded.state_dict(), "shard": saved})
    for params, optimizer in (((binary, real), sharded), ((other_binary, other_real), other)):
        backward(params, 1)
        optimizer.step()
    assert torch.equal(other.gather_state()["b"]["latent"], sharded.gather_state()["b"]["latent"])
    assert (other.gather_state()["b"]["latent"] - latent).abs().max() < 2e-3
    sharded.close()
    other.close()
