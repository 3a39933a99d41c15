"""The controller of TRS against its formula, and in the sharded step."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.optim import OptimConfig, RoutedOptimizer, Schedule, ShardedOptimizer, constant, linear
from bitfleet.optim.transitions import (
    PART,
    Target,
    TransitionConfig,
    TransitionController,
    check_transitions,
    driven_values,
    next_value,
)

TARGET = Target(
    drives="gamma", schedule=Schedule(start=0.02, kind="cosine", num_steps=30), momentum=0.8, gain=5.0, initial=0.1
)
STARTS = {"latent_lr": 0.1, "gamma": 0.1, "threshold": 0.05}


def make(drives: Any, seed: int = 0) -> tuple[list[nn.Parameter], ShardedOptimizer]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator).sign()) for shape in ((30, 7), (129,))]
    rule: dict[str, Any] = {"rule": "bop", "gamma": 0.1, "threshold": 0.05}
    if drives == "latent_lr":
        rule = {"rule": "latent_sgd", "latent_lr": 0.1, "momentum": 0.5, "seed": 1}
    target = dataclasses.replace(TARGET, drives=drives, initial=STARTS[drives])
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    return params, ShardedOptimizer(
        RoutedOptimizer([{"params": named, **rule, "transitions": target}]), bucket_numel=200
    )


def backward(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    terms = [(param * torch.randn(param.shape, generator=generator)).sum() for param in params]
    torch.stack(terms).sum().backward()


def expected(drives: str, value: float, gap: float) -> float:
    """U_t in the words of the module's docstring."""
    if drives == "latent_lr":
        return max(0.0, value + 5.0 * 0.1 * gap)
    sign = 1 if drives == "gamma" else -1
    return min(value * math.exp(sign * 5.0 * gap), 1.0 if drives == "gamma" else math.inf)


@pytest.mark.parametrize("drives", STARTS)
def test_every_step_follows_the_formula(drives: str) -> None:
    """With the flips counted from the weights themselves, whatever the sharded step counts."""
    params, sharded = make(drives)
    (group,) = sharded.param_groups
    rate, value, fraction, seen = 0.0, STARTS[drives], None, set()
    for step in range(30):
        before = [param.detach().clone() for param in params]
        backward(params, step)
        sharded.step()
        if fraction is not None:
            rate = 0.8 * rate + 0.2 * fraction
            value = expected(drives, value, 0.02 * 0.5 * (1 + math.cos(math.pi * step / 30)) - rate)
        assert driven_values(sharded.param_groups) == pytest.approx({"transition_rate": rate, drives: value}, rel=1e-12)
        changed = sum(int((a != b).sum()) for a, b in zip(before, params, strict=True))
        fraction = changed / (30 * 7 + 129)
        seen.add(changed)
    assert len(seen) > 3
    assert group[drives] != STARTS[drives]
    sharded.close()


def test_a_skipped_step_drives_nothing() -> None:
    params, sharded = make("gamma")
    for step in range(3):
        backward(params, step)
        sharded.step()
    kept, values = sharded.transition_state(), driven_values(sharded.param_groups)
    (params[0] * torch.inf).sum().backward()
    sharded.step()
    assert sharded.num_skipped_steps == 1
    assert sharded.transition_state() == kept
    assert driven_values(sharded.param_groups) == values
    sharded.close()


@pytest.mark.parametrize(("way", "num_updates"), [("state_dict", 10), ("state_dict", 0), ("checkpoint", 10)])
def test_continues_exactly(way: str, num_updates: int) -> None:
    """The first step was skipped: the one after it is the first update, in the copy as well."""
    params, first = make("threshold")
    (params[0] * torch.inf).sum().backward()
    first.step()
    resumed, second = make("threshold", seed=9)
    for step in range(num_updates):
        backward(params, step)
        first.step()
    with torch.no_grad():
        for a, b in zip(resumed, params, strict=True):
            a.copy_(b)
    if way == "state_dict":
        second.load_state_dict(first.state_dict())
    else:
        for mine, saved in zip(second.chunks(), first.chunks(), strict=True):
            mine.tensor.copy_(saved.tensor)
        second.load_steps(first.steps(), first.num_steps, first.num_skipped_steps)
        second.load_transition_state(first.transition_state())
    assert second.num_skipped_steps == 1
    for step in range(num_updates, num_updates + 10):
        for each, optimizer in ((params, first), (resumed, second)):
            backward(each, step)
            optimizer.step()
        assert driven_values(first.param_groups) == driven_values(second.param_groups)
        assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    first.close()
    second.close()


@pytest.mark.parametrize("counts", [[2**24 + 1, 2**24 + 3, 58_236_929], [1, 0, 4095, 2**31 + 7], [PART - 1] * 4000])
def test_sums_of_counts_over_ranks_are_exact(counts: list[int]) -> None:
    """float32, as the all-reduce adds them."""
    total, numel = torch.zeros(2), 10 * sum(counts)
    controllers = [
        TransitionController([{"transitions": TARGET, "gamma": 0.1}], numel, torch.device("cpu")) for _ in counts[:1]
    ]
    (controller,) = controllers
    for count in counts:
        controller.flips.fill_(count)
        total += controller.facts()
    controller.drive(total.tolist(), 0, is_first=False)
    assert controller.groups[0]["transition_rate"] == 0.8 * 0.0 + (1.0 - 0.8) * (sum(counts) / numel)


def test_driven_values_stay_in_their_range() -> None:
    threshold = dataclasses.replace(TARGET, drives="threshold")
    rate = dataclasses.replace(TARGET, drives="latent_lr")
    value = {"up": 0.1, "down": 0.1, "gamma": 0.1, "lr": 0.1}
    for _ in range(10_000):
        value["up"] = next_value(value["up"], -0.5, threshold)
        value["down"] = next_value(value["down"], 0.5, threshold)
        value["gamma"] = next_value(value["gamma"], 0.5, TARGET)
        value["lr"] = next_value(value["lr"], -0.5, rate)
    assert value == pytest.approx({"up": 0.1e6, "down": 0.1e-6, "gamma": 1.0, "lr": 0.0})


def test_a_step_beyond_what_a_float_holds_ends_at_the_limit() -> None:
    """K is 0.5 after step 1 without momentum."""
    eager = {name: dataclasses.replace(TARGET, drives=name, gain=2000.0) for name in ("gamma", "threshold")}
    assert next_value(0.1, -0.5, eager["threshold"]) == 0.1e6
    assert next_value(0.1, 0.5, eager["threshold"]) == 0.1 / 1e6
    assert next_value(0.1, 0.5, eager["gamma"]) == 1.0


def test_a_plain_optimizer_refuses_to_ignore_it() -> None:
    param = nn.Parameter(torch.ones(3))
    plain = RoutedOptimizer([{"params": [param], "rule": "bop", "gamma": 0.1, "threshold": 0.1, "transitions": TARGET}])
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="ShardedOptimizer"):
        plain.step()


@pytest.mark.parametrize(
    ("drives", "rule", "driven", "message"),
    [
        ("latent_lr", "bop", None, "drives 'latent_lr' belongs to the rules latent_adam and latent_sgd, not to bop"),
        ("gamma", "two_ema", constant(0.1), "drives 'gamma' belongs to the rules bop.* and bop.*, not to two_ema"),
        ("gamma", "bop", linear(1e-4, 1e-6), "optim.gamma.*optim.transitions"),
        ("threshold", "bop", constant(0.0), "optim.threshold is 0.0, from where .*expected above 0"),
    ],
)
def test_what_cannot_be_driven(drives: Any, rule: str, driven: Schedule | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_transitions(TransitionConfig(drives=drives), rule, driven)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"transitions.momentum must be in \[0, 1\), not 1.0"),
        ({"gain": 0.0}, "transitions.gain must be finite in float32 and above 0, not 0.0"),
        ({"target": 5e-3}, "transitions.target is 0.005; expected a Schedule"),
        ({"target": constant(1.5)}, "transitions.target is a fraction, but reaches 1.5"),
        (
            {"target": Schedule(start=0.1, kind="exponential", rate=2.0)},
            "transitions.target must not grow by stairs: its rate is 2.0, expected at most 1",
        ),
        ({"drives": "lr"}, "transitions.drives must be one of off, latent_lr, gamma, threshold, not 'lr'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransitionConfig(**options)


def test_the_configuration_gives_the_group_its_target() -> None:
    from bitfleet.optim import build_optimizer

    model = nn.Linear(64, 4, bias=False)
    model.weight.binary = True  # type: ignore[attr-defined]
    config = OptimConfig(rule="latent_adam", latent_lr=constant(2e-3), transitions=TransitionConfig(drives="latent_lr"))
    optimizer, schedules = build_optimizer(model, config, num_steps=50)
    (group,) = optimizer.param_groups
    assert schedules == {"binary": {}}
    assert group["latent_lr"] == 2e-3
    assert group["transitions"].initial == 2e-3
    assert group["transitions"].schedule(25) == pytest.approx(2.5e-3)


def test_without_binary_weights_nothing_can_be_driven() -> None:
    from bitfleet.optim import build_optimizer

    config = OptimConfig(rule="latent_adam", transitions=TransitionConfig(drives="latent_lr"))
    with pytest.raises(ValueError, match="transitions.drives .*'latent_lr'.*binary weights"):
        build_optimizer(nn.Linear(4, 2), config, num_steps=50)


def test_state_of_another_hyperparameter_is_refused() -> None:
    """gamma would begin at a threshold's value, and nothing would say so."""
    (_, first), (_, second) = make("threshold"), make("gamma")
    with pytest.raises(ValueError, match=r"\['threshold'\].*\['gamma'\]"):
        second.load_transition_state(first.transition_state())
    assert second.param_groups[0]["gamma"] == STARTS["gamma"]
    second.load_transition_state(None)
    first.close()
    second.close()


def test_the_count_is_of_the_last_update() -> None:
    """The count is of the last update alone."""
    params, sharded = make("gamma")
    for step in range(2):
        before: list[Tensor] = [param.detach().clone() for param in params]
        backward(params, step)
        sharded.step()
    state = sharded.transition_state()
    assert state is not None
    assert state["flips"] == sum(int((a != b).sum()) for a, b in zip(before, params, strict=True)) > 0
    sharded.close()
