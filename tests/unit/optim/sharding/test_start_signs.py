"""A run whose first stage left real weights starts with their signs."""

import pytest
import torch
from torch import Tensor, nn

from bitfleet.optim import OptimConfig, RoutedOptimizer, ShardedOptimizer, build_optimizer, constant


def network() -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(30, 7, bias=False)
    model.weight.binary = True  # type: ignore[attr-defined]
    return model


def signs(weight: Tensor) -> Tensor:
    return torch.where(weight >= 0, 1.0, -1.0)


def started(model: nn.Module, rule: str, *, sharded: bool) -> RoutedOptimizer | ShardedOptimizer:
    plain, _ = build_optimizer(model, OptimConfig(rule=rule, latent_lr=constant(0.01)), num_steps=10)
    optimizer = ShardedOptimizer(plain) if sharded else plain
    optimizer.start_signs()
    return optimizer


def latent(model: nn.Linear, optimizer: RoutedOptimizer | ShardedOptimizer) -> Tensor:
    if isinstance(optimizer, ShardedOptimizer):
        return optimizer.gather_state()["weight"]["latent"]
    state: Tensor = optimizer.state[model.weight]["latent"]
    return state


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("rule", ["latent_adam", "latent_sgd"])
def test_latent_weights_are_the_real_ones(rule: str, sharded: bool) -> None:
    model = network()
    real = model.weight.detach().clone()
    optimizer = started(model, rule, sharded=sharded)
    assert torch.equal(model.weight, signs(real))
    assert torch.equal(latent(model, optimizer), real)
    grad = torch.randn(7, 30)
    (model.weight * grad).sum().backward()
    optimizer.step()
    moved = latent(model, optimizer)
    assert torch.equal(model.weight, signs(moved))
    step = 0.01 * (grad.sign() if rule == "latent_adam" else grad)
    torch.testing.assert_close(moved, real - step, rtol=0, atol=1e-4)


def test_what_is_not_finite_is_left_for_the_first_step_to_find() -> None:
    model = network()
    model.weight.data[0, 0] = torch.nan
    started(model, "latent_adam", sharded=True)
    assert model.weight[0, 0].isnan()
    assert (model.weight.flatten()[1:].abs() == 1).all()


@pytest.mark.parametrize("sharded", [True, False])
def test_other_rules_start_with_the_signs_and_real_ones_stay(sharded: bool) -> None:
    model = network()
    real = model.weight.detach().clone()
    plain, _ = build_optimizer(model, OptimConfig(rule="bop"), num_steps=10)
    optimizer = ShardedOptimizer(plain) if sharded else plain
    optimizer.start_signs()
    assert torch.equal(model.weight, signs(real))
    if not sharded:
        assert not optimizer.state  # ZeRO replaces the parameters that it would belong to
    model = network()
    started(model, "real_adam", sharded=sharded)
    assert torch.equal(model.weight, real)
