"""BNEW against its formula, its phases, and cut into slices."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, RoutedOptimizer, Schedule, ShardedOptimizer, build_optimizer, is_binary
from bitfleet.optim.rules.bnew import phase_schedules
from bitfleet.optim.rules.counter_random import uniform
from bitfleet.optim.rules.latent import glorot_limit
from bitfleet.optim.rules.rule import numbers_of
from bitfleet.optim.sharding.buckets import Bucket, make_buckets

GROUP = {"rule": "bnew", "latent_lr": 0.05, "rho": 0.02, "free": 1.0, "seed": 3}


def signs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).sign()


def optimizer_of(param: nn.Parameter) -> RoutedOptimizer:
    return RoutedOptimizer([{"params": [("w", param)], **GROUP}])


def test_formula_in_float64() -> None:
    param = nn.Parameter(signs(20, 30))
    optimizer = optimizer_of(param)
    limit = math.sqrt(6 / (20 + 30))
    w = (param.detach() * uniform(3, "w", 0, 600).view(20, 30)).double().numpy() * limit
    m = v = np.zeros_like(w)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 41):
        param.grad = torch.randn(20, 30, generator=generator) + 0.5 * signs(20, 30, seed=2)
        g = param.grad.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        rate = 0.05 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        w = np.clip((w - rate * m / (np.sqrt(v) + 1e-7)) * (1 + 2 * 0.02), -1, 1)
        optimizer.step()
        np.testing.assert_allclose(param.detach().numpy(), w, atol=2e-5)
    assert 0 < (np.abs(w) == 1).sum() < w.size


def test_frozen_weights_are_signs_and_stay() -> None:
    param = nn.Parameter(torch.tensor([0.3, -0.2, 0.0, -0.0, 1.0, -1.0]))
    optimizer = optimizer_of(param)
    optimizer.param_groups[0]["free"] = 0.0
    for _ in range(3):
        param.grad = torch.randn(6)
        optimizer.step()
        assert param.tolist()[:4] == [1, -1, 1, 1]
        assert bool((param.abs() == 1).all())
    assert not optimizer.state[param]["exp_avg"].any()


def test_only_signs_begin_anew() -> None:
    """A weight that was read from a file keeps its value."""
    param = nn.Parameter(torch.tensor([[0.25, -1.0], [1.0, -0.5]]))
    optimizer = optimizer_of(param)
    optimizer.param_groups[0] |= {"latent_lr": 0.0, "rho": 0.0}
    param.grad = torch.ones(2, 2)
    optimizer.step()
    u = uniform(3, "w", 0, 4) * glorot_limit(torch.Size((2, 2)))
    assert param.flatten().tolist() == [0.25, -float(u[1]), float(u[2]), -0.5]


def test_clipping_leaves_weights_that_become_binary_alone() -> None:
    """By their mark: they travel as values. Neither are they scaled, nor do they count for the
    norm."""
    marked, bias, unmarked = nn.Parameter(signs(4, 5)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
    marked.binary = True  # type: ignore[attr-defined]
    adam = {"rule": "keras_adam", "betas": (0.9, 0.999), "eps": 1e-7, "lr": 0.1, "weight_decay": 0.0}
    groups = [{"params": [("w", marked), ("b", unmarked)], **GROUP}, {"params": [("bias", bias)], **adam}]
    sharded = ShardedOptimizer(RoutedOptimizer(groups), max_grad_norm=1.0)
    (2.0 * marked.sum() + 3.0 * bias.sum() + 4.0 * unmarked.sum()).backward()
    sharded.step()
    norm = math.sqrt(3 * 3.0**2 + 4 * 4.0**2)
    found = {name: state["exp_avg"].unique() for name, state in sharded.gather_state().items()}
    for name, expected in {"w": 2.0, "bias": 3.0 / norm, "b": 4.0 / norm}.items():
        torch.testing.assert_close(found[name], torch.tensor([0.1 * expected]))
    sharded.close()


def test_slices_have_the_bits_of_the_whole() -> None:
    """As three ranks would have them, through buckets of values."""
    whole = nn.Parameter(signs(17, 23))
    plain = optimizer_of(whole)
    cut = [nn.Parameter(signs(17, 23)) for _ in range(3)]
    buckets: list[Bucket] = [
        make_buckets(optimizer_of(param).param_groups, 10_000, rank, 3)[0] for rank, param in enumerate(cut)
    ]
    assert not any(bucket.binary for bucket in buckets)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        grad = torch.randn(17, 23, generator=generator)
        whole.grad = grad.clone()
        plain.step()
        flat = torch.zeros(buckets[0].weights.numel())
        flat[: grad.numel()] = grad.flatten()
        for bucket in buckets:
            for run in bucket.advance([True]):
                bucket.update_(flat[bucket.begin : bucket.end], run, numbers_of(bucket.group, run.step), None)
    joined = torch.cat([bucket.weights[bucket.begin : bucket.end] for bucket in buckets])[: whole.numel()]
    assert torch.equal(joined, whole.detach().flatten())


def test_phases_follow_the_run() -> None:
    schedules = phase_schedules({"rho": 0.3, "rho_from": 0.25, "frozen_from": 0.9}, 40)
    assert [schedules["rho"](step) for step in (0, 10, 25, 40)] == pytest.approx([0, 0, 0.15, 0.3])
    assert [schedules["free"](step) for step in (0, 35, 36, 39, 1000)] == [1, 1, 0, 0, 0]
    assert phase_schedules({"rho": 0.3, "rho_from": 0.0, "frozen_from": 0.5}, 1)["free"](0) == 1


def test_phases_are_parts_of_the_steps_that_are_made() -> None:
    """6,000 images in batches of 700: 8 whole ones per epoch, 160 steps and not 171."""
    model = create_model(ModelConfig(name="birealnet_small", num_classes=10, width=8))
    _, schedules = build_optimizer(
        model, OptimConfig(rule="bnew"), num_steps=20 * 6000 // 700, num_epochs=20, steps_per_epoch=8
    )
    assert [schedules["binary"]["free"](step) for step in (151, 152, 159)] == [1, 0, 0]


def test_delay_of_a_schedule() -> None:
    schedule = Schedule(start=1.0, end=0.0, kind="polynomial", delay_steps=4).over(8)
    assert [schedule(step) for step in (0, 4, 5, 8, 9)] == [1, 1, 0.75, 0, 0]
    with pytest.raises(ValueError, match="delay_steps .*-1"):
        Schedule(start=1.0, delay_steps=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, r"optim.rho must be in \[0, 1\], not -0.1"),
        (
            {"rho_from": 0.9, "frozen_from": 0.8},
            "optim.rho_from is 0.9 and optim.frozen_from 0.8: .*rho_from < frozen_from < 1",
        ),
        ({"frozen_from": 1.0}, "optim.frozen_from 1.0"),
        ({"momentum": 0.9}, "optim.momentum belongs to latent_sgd; the rule bnew has latent_lr, rho"),
    ],
)
def test_wrong_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(rule="bnew", **options)  # type: ignore[arg-type]


def test_a_short_run_ends_in_signs() -> None:
    """A whole network through the sharded optimizer: real weights in [-1, 1], then +-1 from the
    step of the schedule on."""
    torch.manual_seed(0)
    model = create_model(ModelConfig(name="birealnet_small", num_classes=10, width=8))
    optimizer, schedules = build_optimizer(model, OptimConfig(rule="bnew", rho=0.1), num_steps=20)
    sharded = ShardedOptimizer(optimizer)
    binary = [param for param in model.parameters() if is_binary(param)]
    for step in range(20):
        for group in sharded.param_groups:
            group |= {key: schedule(step) for key, schedule in schedules[group["name"]].items()}
        model(torch.randn(4, 3, 28, 28)).square().mean().backward()
        sharded.step()
        largest, is_signs = (
            max(float(w.detach().abs().max()) for w in binary),
            all((w.abs() == 1).all() for w in binary),
        )
        assert largest <= 1
        assert is_signs == (step >= 19)
    assert list(sharded.bit_chunks()) == []
    sharded.close()
