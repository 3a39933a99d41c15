"""The optimizers of the full-precision parameters, against torch and against formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer, constant, linear
from bitfleet.optim.param_groups import DECAYED, FULL_PRECISION

NUM_STEPS = 20
RULES = ("keras_adam", "adam", "keras_sgd")


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, generator=generator) * 10.0 ** -(step % 9) for step in range(NUM_STEPS)]


def trained(config: OptimConfig, *, sharded: bool = False, binary: bool = False) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(5, 6, bias=False)
    model.weight.binary = binary  # type: ignore[attr-defined]
    optimizer: Any
    optimizer, schedules = build_optimizer(model, config, num_steps=NUM_STEPS)
    if sharded:
        optimizer = ShardedOptimizer(optimizer)
    for step, grad in enumerate(gradients()):
        (model.weight * grad).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group |= {key: schedule(step + 1) for key, schedule in schedules[group["name"]].items()}
    return model.weight.detach()


def by_torch(optimizer_of: Any) -> Tensor:
    torch.manual_seed(0)
    weight = nn.Linear(5, 6, bias=False).weight
    optimizer = optimizer_of([weight])
    for grad in gradients():
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


def test_adam_is_torchs_with_its_weight_decay() -> None:
    """The gradients go down to 1e-8, where the place of epsilon shows."""
    config = OptimConfig(full_precision="adam", lr=constant(0.01), weight_decay=0.1, decayed=("weight",))
    there = by_torch(lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1, foreach=False))
    torch.testing.assert_close(trained(config), there, rtol=1e-6, atol=1e-7)
    plain = OptimConfig(full_precision="adam", lr=constant(0.01))
    there = by_torch(lambda params: torch.optim.Adam(params, lr=0.01, foreach=False))
    torch.testing.assert_close(trained(plain), there, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(trained(OptimConfig(lr=constant(0.01))), there, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sharded", [False, True])
def test_real_adam_is_torchs_adam_on_the_weights_marked_as_binary(sharded: bool) -> None:
    config = OptimConfig(rule="real_adam", latent_lr=constant(0.01), latent_decay=0.1)
    there = by_torch(lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.1, foreach=False))
    torch.testing.assert_close(trained(config, sharded=sharded, binary=True), there, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"optim\.latent_decay must be finite in float32 and not negative, not -1"):
        OptimConfig(rule="real_adam", latent_decay=-1.0)


def test_sgd_is_torchs_while_the_learning_rate_is_constant() -> None:
    config = OptimConfig(full_precision="keras_sgd", lr=constant(0.1), weight_decay=0.1, decayed=("weight",))
    there = by_torch(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1))
    torch.testing.assert_close(trained(config), there, rtol=1e-5, atol=1e-6)


def test_sgd_keeps_the_learning_rate_of_each_gradient_as_keras() -> None:
    """ResourceApplyKerasMomentum: accum = accum * momentum - lr * grad; var += accum."""
    lr = linear(0.1, 0.0).over(NUM_STEPS)
    torch.manual_seed(0)
    weight = nn.Linear(5, 6, bias=False).weight.detach().double()
    velocity = torch.zeros(6, 5, dtype=torch.float64)
    for step, grad in enumerate(gradients()):
        velocity = 0.9 * velocity - lr(step) * grad.double()
        weight += velocity
    ours = trained(OptimConfig(full_precision="keras_sgd", lr=linear(0.1, 0.0)))
    torch.testing.assert_close(ours.double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_sharded_optimizer_has_the_same_bits(rule: Any) -> None:
    config = OptimConfig(full_precision=rule, lr=linear(0.1, 0.0), weight_decay=0.1, decayed=("weight",))
    assert torch.equal(trained(config), trained(config, sharded=True))


def test_groups_have_the_optimizer_and_only_the_named_parameters_decay() -> None:
    model = nn.Linear(5, 6)
    config = OptimConfig(full_precision="keras_sgd", weight_decay=0.1, decayed=("bias",))
    optimizer, _ = build_optimizer(model, config, num_steps=1)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: (group["rule"], group["weight_decay"]) for name, group in groups.items()} == {
        FULL_PRECISION: ("keras_sgd", 0.0),
        DECAYED: ("keras_sgd", 0.1),
    }
    assert groups[FULL_PRECISION]["momentum"] == 0.9
    with pytest.raises(
        ValueError, match=r"optim\.full_precision must be one of keras_adam, adam, keras_sgd, not 'sgd'"
    ):
        OptimConfig(full_precision="sgd")  # type: ignore[arg-type]


def latent_after(options: dict[str, Any], start: list[float], grad: list[float]) -> tuple[list[float], list[float]]:
    """Latent weights and signs after 4 steps."""
    model = nn.Linear(len(start), 1, bias=False)
    model.weight.data = torch.tensor([start])
    model.weight.binary = True  # type: ignore[attr-defined]
    config = OptimConfig(rule="latent_adam", latent_lr=constant(0.1), **options)
    optimizer, _ = build_optimizer(model, config, num_steps=1)
    for _ in range(4):
        model.weight.grad = torch.tensor([grad])
        optimizer.step()
    return optimizer.state[model.weight]["latent"].tolist()[0], model.weight.tolist()[0]


def test_latent_weights_are_clipped_where_the_recipe_says() -> None:
    start, grad = [0.9, -0.9, 0.1], [-1.0, 1.0, 1.0]
    latent, signs = latent_after({}, start, grad)
    assert latent == pytest.approx([1.0, -1.0, -0.3], abs=1e-5)
    assert signs == [1.0, -1.0, -1.0]
    assert latent_after({"latent_clip": 1.25}, start, grad)[0] == pytest.approx([1.25, -1.25, -0.3], abs=1e-5)


def test_without_a_clip_no_gradient_passes_beyond_1() -> None:
    """The first step leads from 0.95 to 1.05; from there the moments fade, as torch's of zero
    gradients do."""
    latent = nn.Parameter(torch.tensor([0.95, 0.1]))
    there = torch.optim.Adam([latent], lr=0.1, eps=1e-7)
    for step in range(4):
        latent.grad = torch.tensor([-1.0 if step == 0 else 0.0, 1.0])
        there.step()
    ours, _ = latent_after({"latent_clip": 0.0}, [0.95, 0.1], [-1.0, 1.0])
    assert ours == pytest.approx(latent.tolist(), abs=1e-6)
    assert ours[0] > 1.2


def test_epsilon_of_latent_adam() -> None:
    latent, _ = latent_after({"latent_eps": 1e-2}, [0.5], [1e-3])
    assert 0.47 < latent[0] < 0.5
    with pytest.raises(ValueError, match=r"optim\.latent_eps must be finite in float32 and not negative, not -1"):
        OptimConfig(rule="latent_adam", latent_eps=-1.0)
    with pytest.raises(ValueError, match=r"optim\.latent_clip belongs to latent_adam"):
        OptimConfig(rule="bop", latent_clip=1.25)
