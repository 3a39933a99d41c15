import copy
from typing import Any

import pytest
import torch
from torch import nn

from bitfleet.optim import (
    Bop,
    Bop2ndOrder,
    OptimConfig,
    RoutedOptimizer,
    ShardedOptimizer,
    bop2ndorder_step_,
    build_optimizer,
)
from bitfleet.optim.rules.rule import RULES, binary_rules


def signs(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.mark.parametrize("correction", ["none", "as_coded", "adam"])
def test_slices_give_the_bits_of_the_whole(correction: str) -> None:
    """Sharding relies on it: the rule is elementwise, whatever the alignment of a slice."""
    whole = Bop2ndOrder([nn.Parameter(signs(1001))], gamma=1e-2, sigma=1e-3, threshold=1e-3, correction=correction)
    cuts = [(0, 64), (64, 107), (107, 1001)]
    parts = Bop2ndOrder(
        [nn.Parameter(signs(1001)[a:b].clone()) for a, b in cuts],
        gamma=1e-2,
        sigma=1e-3,
        threshold=1e-3,
        correction=correction,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        grad = torch.randn(1001, generator=generator)
        whole.param_groups[0]["params"][0].grad = grad.clone()
        for param, (a, b) in zip(parts.param_groups[0]["params"], cuts, strict=True):
            param.grad = grad[a:b].clone()
        whole.step()
        parts.step()
    (param,) = whole.param_groups[0]["params"]
    assert torch.equal(param, torch.cat(parts.param_groups[0]["params"]))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(
            whole.state[param][key], torch.cat([parts.state[p][key] for p in parts.param_groups[0]["params"]])
        )
    assert not torch.equal(param, signs(1001))


@pytest.mark.parametrize(
    "make",
    [lambda p: Bop(p, gamma=0.1, threshold=1e-3), lambda p: Bop2ndOrder(p, gamma=0.1, sigma=0.1, threshold=1e-3)],
)
def test_state_dict_continues_exactly(make) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(2)
    grads = torch.randn(20, 100, generator=generator)
    straight = nn.Parameter(signs(100))
    optimizer = make([straight])
    for grad in grads[:10]:
        straight.grad = grad
        optimizer.step()
    resumed = nn.Parameter(straight.detach().clone())
    other = make([resumed])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grad in grads[10:]:
        straight.grad = resumed.grad = grad
        optimizer.step()
        other.step()
    assert torch.equal(straight, resumed)
    assert int(other.state[resumed]["step"]) == 20


def test_state_of_another_rule_is_refused() -> None:
    weight = nn.Parameter(signs(10))
    bop, adam = Bop([weight], gamma=0.1, threshold=0.0), torch.optim.Adam([weight])
    weight.grad = torch.ones_like(weight)
    adam.step()
    second = Bop2ndOrder([weight], gamma=0.1, sigma=0.1, threshold=0.0)
    for other, rule in ((second, "'bop2ndorder'"), (adam, "None")):
        with pytest.raises(ValueError, match=rf"rules \[{rule}\], here they are \['bop'\]"):
            bop.load_state_dict(other.state_dict())
    assert bop.param_groups[0]["rule"] == "bop"
    assert not bop.state


def test_state_keys_are_those_that_deepspeed_knows() -> None:
    weight = nn.Parameter(signs(10).to(torch.bfloat16))
    optimizer = Bop2ndOrder([weight], gamma=0.1, sigma=0.1, threshold=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert set(optimizer.state[weight]) == {"exp_avg", "exp_avg_sq", "step"}
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32
    assert weight.dtype == torch.bfloat16


def test_each_parameter_counts_its_own_steps() -> None:
    """DeepSpeed's ZeRO calls step() once for each group."""
    params = [nn.Parameter(signs(4)), nn.Parameter(signs(4))]
    optimizer = Bop2ndOrder([{"params": [p]} for p in params], gamma=0.1, sigma=0.1, threshold=0.0, correction="adam")
    groups = optimizer.param_groups
    for param in params:
        param.grad = torch.ones(4)
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 1]


def test_parameters_without_gradient_are_left_alone() -> None:
    weight = nn.Parameter(signs(10))
    optimizer = Bop([weight], gamma=0.1, threshold=0.0)
    optimizer.step()
    assert torch.equal(weight, signs(10))
    assert not optimizer.state[weight]


def test_as_coded_is_the_biased_rule_with_another_threshold() -> None:
    """paper.md section 1: at constant rates unbiased(threshold) is biased(threshold * gamma /
    sqrt(sigma))."""
    gamma, sigma, threshold = 2.0**-10, 2.0**-8, 1e-3
    biased, as_coded = signs(1000), signs(1000)
    moments = [torch.zeros(1000) for _ in range(4)]
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        grad = torch.randn(1000, generator=generator)
        bop2ndorder_step_(
            as_coded, grad, *moments[:2], gamma=gamma, sigma=sigma, threshold=threshold, correction="as_coded"
        )
        bop2ndorder_step_(
            biased, grad, *moments[2:], gamma=gamma, sigma=sigma, threshold=threshold * gamma / sigma**0.5
        )
    assert (biased == as_coded).float().mean() > 0.999
    assert (biased != signs(1000)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma must be in"),
        ({"gamma": 1.5}, "gamma must be in"),
        ({"sigma": -1.0}, "sigma must be in"),
        ({"threshold": -1e-9}, "threshold must not be negative"),
        ({"threshold": float("nan")}, "threshold must not be negative"),
        ({"correction": "unbiased"}, "'unbiased'"),
    ],
)
def test_bad_hyperparameters_are_named(options: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"gamma": 0.1, "sigma": 0.1, "threshold": 0.0}
    with pytest.raises(ValueError, match=message):
        Bop2ndOrder([nn.Parameter(signs(4))], **(good | options))  # type: ignore[arg-type]


def test_bad_hyperparameters_of_a_group_are_named() -> None:
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\], not 5.0"):
        Bop([{"params": [nn.Parameter(signs(4))], "gamma": 5.0}], gamma=0.1, threshold=0.0)
    optimizer = Bop([nn.Parameter(signs(4))], gamma=0.1, threshold=0.0)
    for options in ({"gamma": float("nan")}, {"threshold": -1.0}, {"rule": "two_ema", "alpha": 2.0}):
        with pytest.raises(ValueError, match=f"{list(options)[-1]} must "):
            optimizer.add_param_group({"params": [nn.Parameter(signs(4))], **options})
    with pytest.raises(ValueError, match="latent_lr must not be negative, not nan"):
        RoutedOptimizer([nn.Parameter(signs(4))], {"rule": "sgdat", "latent_lr": float("nan"), "threshold": 0.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("group", "missing"),
    [
        ({"rule": "bop", "threshold": 0.1}, "gamma"),
        ({"rule": "bop2ndorder", "gamma": 0.1, "sigma": 0.1, "threshold": 0.1}, "correction"),
        ({"rule": "latent_sgd", "latent_lr": 0.1, "seed": 1}, "momentum"),
        ({"rule": "diode", "gamma": 0.1, "alpha": 0.1, "latent_lr": 0.1}, "seed"),
        ({"rule": "keras_adam", "lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0}, "eps"),
    ],
)
def test_a_missing_hyperparameter_is_named(group: dict[str, Any], missing: str) -> None:
    weight = nn.Parameter(signs(4))
    optimizer = RoutedOptimizer([weight], group)
    weight.grad = torch.ones(4)
    message = f"a group of the rule {group['rule']} has no '{missing}'"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    if RULES[group["rule"]].flips:
        weight.data /= 2
        with pytest.raises(ValueError, match=message):
            optimizer.start_signs()
        weight.data *= 2
    with pytest.raises(ValueError, match=message):
        ShardedOptimizer(RoutedOptimizer([weight], group))
    assert torch.equal(weight, signs(4))


def test_steps_of_parameters_without_names() -> None:
    weights = [nn.Parameter(signs(4)), nn.Parameter(signs(4))]
    optimizer = Bop(weights, gamma=0.1, threshold=0.0)
    weights[1].grad = torch.ones(4)
    optimizer.step()
    assert optimizer.steps() == {"0.0": 0, "0.1": 1}
    optimizer.create_state()
    optimizer.load_steps({"0.0": 5, "0.1": 2})
    assert optimizer.steps() == {"0.0": 5, "0.1": 2}


def test_an_unknown_correction_is_not_taken_for_adams() -> None:
    tensors = signs(4), signs(4), torch.zeros(4), torch.zeros(4)
    with pytest.raises(ValueError, match="correction must be one of none, as_coded, adam, not 'foo'"):
        bop2ndorder_step_(*tensors, gamma=0.1, sigma=0.1, threshold=0.0, correction="foo")  # type: ignore[arg-type]


def test_a_rate_of_one_needs_no_correction() -> None:
    weights = [nn.Parameter(signs(100)) for _ in range(2)]
    for weight, correction in zip(weights, ("adam", "none"), strict=True):
        optimizer = Bop2ndOrder([weight], gamma=1.0, sigma=1.0, threshold=1e-3, correction=correction)  # type: ignore[arg-type]
        weight.grad = torch.randn(100, generator=torch.Generator().manual_seed(4))
        optimizer.step()
    assert torch.equal(*weights)


@pytest.mark.parametrize("rule", ["keras_adam", *binary_rules()])
def test_bf16_weights_keep_fp32_state(rule: str) -> None:
    """Through an update, and through a state dict."""
    torch.manual_seed(5)
    model = nn.Linear(30, 20, bias=False).bfloat16()
    if rule != "keras_adam":
        model.weight.data = signs(600).view(20, 30).bfloat16()
        model.weight.binary = True  # type: ignore[attr-defined]
    config = OptimConfig() if rule == "keras_adam" else OptimConfig(rule=rule)  # type: ignore[arg-type]
    first, _ = build_optimizer(model, config, num_steps=10)
    for _ in range(3):
        model.weight.grad = torch.randn(20, 30).bfloat16()
        first.step()
    second, _ = build_optimizer(model, config, num_steps=10)
    second.load_state_dict(second.state_dict())
    assert second.steps() == {"weight": 0}
    second.load_state_dict(first.state_dict())
    (state,), (loaded,) = first.state.values(), second.state.values()
    assert int(loaded["step"]) == 3
    for key in RULES[rule].state_keys:
        assert state[key].any()
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], state[key])


@pytest.mark.parametrize("correction", ["as_coded", "adam"])
@pytest.mark.parametrize("rate", ["gamma", "sigma"])
def test_a_correction_does_not_divide_by_0(rate: str, correction: str) -> None:
    """0 / 0 is NaN, with which every weight became +1."""
    weight = nn.Parameter(signs(100))
    optimizer = Bop2ndOrder([weight], gamma=0.1, sigma=0.1, threshold=1e-3, correction=correction)  # type: ignore[arg-type]
    optimizer.param_groups[0][rate] = 0.0  # as by a schedule
    weight.grad = torch.ones(100)
    with pytest.raises(ValueError, match=f"'{correction}' .*gamma and sigma"):
        optimizer.step()
    assert torch.equal(weight, signs(100))


def test_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="'bob'.*'bop'"):
        RoutedOptimizer([{"params": [nn.Parameter(signs(4))], "rule": "bob"}])
