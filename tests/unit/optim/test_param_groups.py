import dataclasses
import math

import pytest
import torch
from torch import nn

from bitfleet.optim import (
    OptimConfig,
    RoutedOptimizer,
    Schedule,
    binary_rules,
    build_optimizer,
    check_claims,
    constant,
    linear,
    param_groups,
    routing_table,
    with_rule,
)
from bitfleet.optim.rules.rule import RULES


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.where(model[1].weight >= 0, 1.0, -1.0))
    model[1].weight.binary = True
    return model


def names(groups: list[dict[str, object]]) -> dict[object, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}  # type: ignore[attr-defined]


def test_every_parameter_lands_in_one_group() -> None:
    assert names(param_groups(network(), decayed=["0.weight", "2.w*"])) == {
        "binary": ["1.weight"],
        "full_precision": ["0.bias", "2.bias"],
        "full_precision_decayed": ["0.weight", "2.weight"],
    }


def test_frozen_parameters_are_left_out_and_tied_ones_count_once() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    model.add_module("tied", nn.Linear(8, 2))
    model.tied.weight = model[2].weight
    assert names(param_groups(model)) == {
        "binary": ["1.weight"],
        "full_precision": ["0.bias", "2.weight", "2.bias", "tied.bias"],
    }


def test_a_pattern_without_a_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\['3.weight'\]"):
        param_groups(network(), decayed=["3.weight"])
    with pytest.raises(ValueError, match=r"\['1.weight'\]"):  # binary weights have no decay
        param_groups(network(), decayed=["1.weight"])
    with pytest.raises(ValueError, match=r"decayed is '\*.weight'; expected a sequence"):
        param_groups(network(), decayed="*.weight")


def test_missing_and_foreign_claims_are_named() -> None:
    model = network()
    optimizer, _ = build_optimizer(model, OptimConfig(), num_steps=10)
    check_claims(model, optimizer)
    model.add_module("late", nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"late\.weight .*\b0\b"):
        check_claims(model, optimizer)
    del model.late
    optimizer.add_param_group({"params": [("x", nn.Parameter(torch.ones(1)))], "rule": "keras_adam", "name": "x"})
    with pytest.raises(ValueError, match="1 parameter"):
        check_claims(model, optimizer)


def test_a_parameter_claimed_twice_is_named() -> None:
    model = network()
    adam = {"rule": "keras_adam", "betas": (0.9, 0.999), "eps": 1e-7, "lr": 0.1, "weight_decay": 0.0}
    optimizer = RoutedOptimizer([{"params": list(model.parameters()), **adam}])
    optimizer.param_groups.append({"params": [model[0].bias], **adam})
    with pytest.raises(ValueError, match=r"0\.bias .*\b2\b"):
        check_claims(model, optimizer)


def test_built_optimizer_trains_both_kinds() -> None:
    model = network()
    config = OptimConfig(gamma=linear(1.0, 0.5), sigma=constant(1.0), threshold=constant(1e-8), lr=constant(0.1))
    optimizer, schedules = build_optimizer(model, config, num_steps=10)
    assert schedules["binary"]["gamma"](5) == 0.75
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.randn(16, 4)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert set(model[1].weight.detach().unique().tolist()) <= {-1.0, 1.0}


def test_weight_decay_is_coupled() -> None:
    """As an L2 term of the loss: the gradient of a parameter with zero gradient is weight_decay *
    w."""
    model = network()
    config = OptimConfig(weight_decay=1e-2, decayed=("0.weight",), lr=constant(0.1))
    optimizer, _ = build_optimizer(model, config, num_steps=10)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model[0].weight]["exp_avg"], 1e-3 * weight)
    assert torch.equal(model[0].bias, bias)


def test_table_counts_weights_and_state() -> None:
    optimizer, _ = build_optimizer(network(), OptimConfig(), num_steps=10)
    lines = [line.split() for line in routing_table(optimizer).splitlines()]
    assert ["1.weight", "8x8", "binary", "bop2ndorder", "64", "512"] in lines
    assert ["total", "full_precision", "58", "464"] in lines
    optimizer, _ = build_optimizer(network(), OptimConfig(rule="bop"), num_steps=10)
    assert ["1.weight", "8x8", "binary", "bop", "64", "256"] in [
        line.split() for line in routing_table(optimizer).splitlines()
    ]
    plain = RoutedOptimizer([nn.Parameter(torch.ones(3))], {"rule": "bop", "gamma": 0.1, "threshold": 0.0})
    assert ["0.0", "3", "0", "bop", "3", "12"] in [line.split() for line in routing_table(plain).splitlines()]


@pytest.mark.parametrize("rule", [rule for rule in binary_rules() if RULES[rule].flips])
def test_groups_hold_the_hyperparameters_of_their_rule(rule: str) -> None:
    """And nothing else; where none is set they are the defaults, and one update with them works."""
    model = network()
    config = OptimConfig(rule=rule)  # type: ignore[arg-type]
    optimizer, schedules = build_optimizer(model, config, num_steps=10, seed=4)
    group = next(group for group in optimizer.param_groups if group["name"] == "binary")
    begins = {"seed"} if RULES[rule].begin_ else set()
    assert set(group) == {"params", "param_names", "name", "rule", *binary_rules()[rule], *begins}
    for name, default in binary_rules()[rule].items():
        assert getattr(config, name) == default
        assert group[name] == (default.start if isinstance(default, Schedule) else default)
        assert (name in schedules["binary"]) == isinstance(default, Schedule)
    others = {name for names in binary_rules().values() for name in names} - set(binary_rules()[rule])
    assert all(getattr(config, name) in (None, "none") for name in others)
    model(torch.randn(16, 4)).square().sum().backward()
    optimizer.step()
    assert set(model[1].weight.detach().unique().tolist()) <= {-1.0, 1.0}


def test_another_rule_keeps_what_both_have() -> None:
    config = OptimConfig(
        gamma=linear(1e-3, 1e-4), correction="adam", lr=constant(0.5), weight_decay=0.1, decayed=("x",)
    )
    other = with_rule(config, "two_ema")
    assert (other.gamma, other.sigma, other.threshold, other.correction) == (config.gamma, None, None, "none")
    assert other.alpha == binary_rules()["two_ema"]["alpha"]
    assert (other.lr, other.weight_decay, other.decayed) == (config.lr, 0.1, ("x",))
    assert with_rule(other, "bop2ndorder") == dataclasses.replace(
        OptimConfig(), gamma=config.gamma, lr=config.lr, weight_decay=0.1, decayed=("x",)
    )
    with pytest.raises(ValueError, match="optim.rule "):
        with_rule(config, "keras_adam")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": constant(2.0)}, "optim.gamma must stay in"),
        ({"sigma": linear(1e-3, 2.0)}, "optim.sigma must stay in"),
        ({"gamma": Schedule(start=0.1, kind="exponential", rate=10.0)}, "optim.gamma must not grow by stairs"),
        ({"correction": "adam", "gamma": linear(1e-3, 0.0)}, "optim.gamma must not end at 0"),
        ({"correction": "as_coded", "gamma": linear(0.0, 1e-3)}, "optim.gamma must not start at 0"),
        (
            {"correction": "adam", "gamma": Schedule(start=1e-3, kind="warmup_cosine", end=1e-5, warmup_epochs=1.0)},
            "optim.gamma must not start at 0",
        ),
        ({"correction": "as-coded"}, "correction must be one of none, as_coded, adam, not 'as-coded'"),
        ({"gamma": 1e-4}, "optim.gamma is 0.0001; expected a Schedule"),
        ({"lr": 1e-3}, "optim.lr is 0.001; expected a Schedule"),
        ({"lr": None}, "optim.lr is None; expected a Schedule"),
        ({"rule": "latent_adam", "latent_lr": 1e-3}, "optim.latent_lr is 0.001; expected a Schedule"),
        ({"decayed": "*weight", "weight_decay": 0.1}, r"optim.decayed is '\*weight'; expected a sequence of patterns"),
        ({"weight_decay": -1.0}, "weight_decay must be finite in float32 and not negative, not -1"),
        ({"weight_decay": math.inf, "decayed": ("x",)}, "weight_decay must be finite in float32 .* not inf"),
        ({"weight_decay": 1e39, "decayed": ("x",)}, r"weight_decay must be finite in float32 .* not 1e\+39"),
        ({"rule": "real_adam", "latent_decay": math.inf}, "latent_decay must be finite in float32 .* not inf"),
        ({"rule": "latent_adam", "latent_clip": 1e39}, r"latent_clip must be finite in float32 .* not 1e\+39"),
        ({"weight_decay": 1e-6}, "go together"),
        ({"decayed": ("x",)}, "go together"),
        (
            {"rule": "bop", "correction": "adam"},
            "optim.correction belongs to bop2ndorder; the rule bop has gamma, threshold",
        ),
        (
            {"rule": "bop", "sigma": constant(0.1)},
            "optim.sigma belongs to bop2ndorder; the rule bop has gamma, threshold",
        ),
        (
            {"latent_lr": constant(0.1)},
            "optim.latent_lr belongs to bnew, diode, latent_adam, latent_sgd, real_adam, sgdat; the rule bop2ndorder",
        ),
        ({"rule": "latent_adam", "momentum": 0.0}, "optim.momentum belongs to latent_sgd"),
        ({"rule": "latent_sgd", "momentum": 1.0}, r"momentum must be in \[0, 1\), not 1.0"),
        ({"rule": "two_ema", "alpha": constant(0.0)}, "optim.alpha must stay in"),
        ({"rule": "bob"}, "optim.rule must be one of .*bop2ndorder.*, not 'bob'"),
    ],
)
def test_bad_configurations_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)  # type: ignore[arg-type]


def test_a_correction_accepts_a_cosine_without_warm_up_which_does_not_start_at_0() -> None:
    gamma = Schedule(start=1e-3, kind="warmup_cosine", end=1e-5)
    assert OptimConfig(correction="adam", gamma=gamma).gamma == gamma


def test_a_rule_with_a_hyperparameter_of_its_own_is_told_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "mine", dataclasses.replace(RULES["bop"], name="mine", defaults={"beta": 0.9}))
    with pytest.raises(
        ValueError, match=r"the rule mine has the hyperparameter beta, which .* add it to optim/config.py"
    ):
        OptimConfig(rule="mine")
