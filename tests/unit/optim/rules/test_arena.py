"""The rules without golden vectors: against their formulas in float64, written down once more, and
at ties."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitfleet.optim import (
    RoutedOptimizer,
    ShardedOptimizer,
    diode_step_,
    latent_sgd_step_,
    sgdat_step_,
    two_ema_step_,
)
from bitfleet.optim.rules.counter_random import uniform
from bitfleet.optim.rules.rule import RULES, Group, Rule, State, numbers_of
from bitfleet.optim.sharding.buckets import make_buckets
from bitfleet.optim.sharding.state import chunks

SHAPE, STEPS = (6, 5, 3, 3), 150
Array = np.ndarray[Any, np.dtype[np.float64]]

GROUPS: dict[str, dict[str, Any]] = {
    "latent_adam": {"latent_lr": 2e-2, "seed": 5},
    "latent_sgd": {"latent_lr": 2e-2, "momentum": 0.8, "seed": 5},
    "two_ema": {"gamma": 0.2, "alpha": 0.03},
    "sgdat": {"latent_lr": 1e-2, "threshold": 3e-3},
    "diode": {"latent_lr": 1e-2, "gamma": 0.2, "alpha": 0.03, "seed": 5},
}


def make(name: str, params: Any, **changes: float) -> RoutedOptimizer:
    return RoutedOptimizer(params, {"rule": name, **GROUPS[name], **changes})


def gradients() -> list[torch.Tensor]:
    """Noise around a separate mean for each weight, of which some are large: clipping is
    reached."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(SHAPE, generator=generator)
    return [0.5 * mean + torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]


def first_weight() -> torch.Tensor:
    return torch.randint(0, 2, SHAPE, generator=torch.Generator().manual_seed(1)).float() * 2 - 1


def numbers() -> Array:
    return uniform(5, "0.0", 0, math.prod(SHAPE)).double().numpy().reshape(SHAPE)


def sign(x: Array) -> Array:
    return np.where(x >= 0, 1.0, -1.0)


# Each yields (signal whose sign or size decides, weights) after every update.


def latent_adam(w: Array, grads: list[Array]) -> Any:
    latent = w * numbers() * math.sqrt(6 / (5 * 9 + 6 * 9))
    m, v = np.zeros(SHAPE), np.zeros(SHAPE)
    for t, g in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        rate = 2e-2 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        latent = np.clip(latent - rate * m / (np.sqrt(v) + 1e-7), -1, 1)
        yield latent, sign(latent)


def latent_sgd(w: Array, grads: list[Array]) -> Any:
    latent = w * numbers() * math.sqrt(6 / (5 * 9 + 6 * 9))
    u = np.zeros(SHAPE)
    for g in grads:
        u = 0.8 * u + g
        latent = np.clip(latent - 2e-2 * u, -1, 1)
        yield latent, sign(latent)


def two_ema(w: Array, grads: list[Array]) -> Any:
    u, h = np.zeros(SHAPE), np.zeros(SHAPE)
    for g in grads:
        u = (1 - 0.2) * u + 0.2 * g
        h = (1 - 0.03) * h + 0.03 * u
        w = np.where(w * h > 0, -w, w)
        yield h, w


def sgdat(w: Array, grads: list[Array]) -> Any:
    accumulator, flips = np.zeros(SHAPE), np.zeros(SHAPE)
    for g in grads:
        accumulator = accumulator - 1e-2 * g
        margin = np.abs(accumulator) - 3e-3 * flips
        new = np.where(margin > 0, sign(accumulator), w)
        flips += new != w
        w = new
        yield np.minimum(np.abs(margin), np.abs(accumulator)), w


def diode(w: Array, grads: list[Array]) -> Any:
    e1, e2 = np.zeros(SHAPE), -w * numbers() * 1e-3
    for g in grads:
        e1 = 0.8 * e1 + 0.2 * g
        e2 = 0.97 * e2 + 0.03 * 1e-2 * np.sign(e1)
        w = np.where(e2 > 0, -1.0, 1.0)
        yield e2, w


FORMULAS = {each.__name__: each for each in (latent_adam, latent_sgd, two_ema, sgdat, diode)}


@pytest.mark.parametrize("name", GROUPS)
def test_rule_is_its_formula(name: str) -> None:
    param = nn.Parameter(first_weight())
    optimizer, grads = make(name, [param]), gradients()
    expected = FORMULAS[name](first_weight().double().numpy(), [g.double().numpy() for g in grads])
    key = {"two_ema": "exp_avg_cascaded", "diode": "exp_avg_sign"}.get(name, "latent")
    num_flips = 0.0
    for grad, (signal, weight) in zip(grads, expected, strict=True):
        before, param.grad = param.detach().clone(), grad
        optimizer.step()
        num_flips += float((before != param).sum())
        clear = np.abs(signal) > 1e-6
        assert clear.mean() > 0.99
        assert np.array_equal(param.detach().double().numpy()[clear], weight[clear])
        if name != "sgdat":
            np.testing.assert_allclose(optimizer.state[param][key].numpy(), signal, rtol=1e-4, atol=1e-6)
    assert num_flips > math.prod(SHAPE) / 2
    assert 0.2 < (param > 0).float().mean() < 0.8
    if name.startswith("latent"):
        assert (optimizer.state[param]["latent"].abs() == 1.0).any()


def test_ties() -> None:
    zeros, minus = torch.zeros(2), torch.tensor([-1.0, 1.0])
    weight = minus.clone()
    latent_sgd_step_(weight, zeros, torch.tensor([-0.0, 0.0]), zeros.clone(), latent_lr=0.1, momentum=0.9)
    assert weight.tolist() == [1.0, 1.0]
    weight = minus.clone()
    two_ema_step_(weight, zeros, zeros.clone(), zeros.clone(), gamma=0.5, alpha=0.5)
    assert torch.equal(weight, minus)
    two_ema_step_(weight, -minus, zeros.clone(), zeros.clone(), gamma=0.5, alpha=0.5)
    assert torch.equal(weight, minus)  # already where descent leads
    weight = minus.clone()
    diode_step_(weight, zeros, zeros.clone(), zeros.clone(), gamma=0.5, alpha=0.5, latent_lr=1.0)
    assert weight.tolist() == [1.0, 1.0]


def test_sgdat_needs_more_for_every_flip() -> None:
    """tau 1 and lr 1: M passes the threshold only when it is larger than the number of flips, not
    when it equals it."""
    weight, accumulator, flips = torch.tensor([1.0]), torch.zeros(1), torch.zeros(1)
    seen = []
    for grad in (0.0, 1.0, -2.0, -0.5, 3.5, 0.5):  # M = 0, -1, 1, 1.5, -2, -2.5
        sgdat_step_(weight, torch.tensor([grad]), accumulator, flips, latent_lr=1.0, threshold=1.0)
        seen.append((float(accumulator), float(weight), float(flips)))
    assert seen == [(0, 1, 0), (-1, -1, 1), (1, -1, 1), (1.5, 1, 2), (-2, 1, 2), (-2.5, -1, 3)]


@pytest.mark.parametrize("name", ["latent_adam", "latent_sgd", "diode"])
def test_state_begins_with_the_weight_that_is_there(name: str) -> None:
    """Without a gradient and a learning rate the first update changes no weight, whatever its
    random number was."""
    param = nn.Parameter(torch.ones(1 << 16) * torch.tensor([1.0, -1.0]).repeat(1 << 15))
    before = param.detach().clone()
    optimizer = make(name, [param])
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_cut_gives_the_state_of_the_whole(name: str, world_size: int) -> None:
    """Slices cut within parameters, one of them without gradient in the first step; three
    updates."""
    shapes = [(13, 5, 2), (7,), (301,), (64, 3)]
    generator = torch.Generator().manual_seed(2)
    signs = [torch.randint(0, 2, shape, generator=generator).float() * 2 - 1 for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]

    def plain_optimizer() -> RoutedOptimizer:
        return make(name, [(f"p{i}", nn.Parameter(each.clone())) for i, each in enumerate(signs)])

    plain = plain_optimizer()
    params = plain.param_groups[0]["params"]
    found: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for step, each in enumerate(grads):
        for index, (param, grad) in enumerate(zip(params, each, strict=True)):
            param.grad = None if step == 0 and index == 2 else grad
        plain.step()
    for rank in range(world_size):
        for bucket in make_buckets(plain_optimizer().param_groups, 1000, rank, world_size):
            for step, each in enumerate(grads):
                flat = torch.zeros(world_size * bucket.slice_numel)
                used = [step > 0 or segment.name != "p2" for segment in bucket.segments]
                for segment in bucket.segments:
                    flat[segment.start : segment.end] = each[int(segment.name[1])].reshape(-1)
                for run in bucket.advance(used):
                    grad = flat[bucket.begin : bucket.end].clone()
                    bucket.update_(grad, run, numbers_of(bucket.group, run.step), None)
            for chunk in chunks([bucket]):
                found.setdefault((chunk.key, chunk.name), []).append((chunk.offset, chunk.tensor))
    for index, param in enumerate(params):
        for key in RULES[name].state_keys:
            parts = [tensor for _, tensor in sorted(found[key, f"p{index}"], key=lambda part: part[0])]
            assert torch.equal(torch.cat(parts), plain.state[param][key].view(-1)), (key, index)


@pytest.mark.parametrize("name", GROUPS)
def test_state_dict_continues_exactly_and_never_begins_twice(name: str) -> None:
    straight = nn.Parameter(first_weight())
    optimizer, grads = make(name, [straight]), gradients()
    for grad in grads[:10]:
        straight.grad = grad
        optimizer.step()
    resumed = nn.Parameter(straight.detach().clone())
    other = make(name, [resumed])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for grad in grads[10:]:
        straight.grad = resumed.grad = grad
        optimizer.step()
        other.step()
    assert torch.equal(straight, resumed)
    for key in RULES[name].state_keys:
        assert torch.equal(optimizer.state[straight][key], other.state[resumed][key])


def test_seed_and_name_choose_the_first_latents() -> None:
    latents = []
    for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b")):
        param = nn.Parameter(first_weight())
        optimizer = make("latent_sgd", [(name, param)], latent_lr=0.0, seed=seed)
        param.grad = torch.zeros(SHAPE)
        optimizer.step()
        latents.append(optimizer.state[param]["latent"])
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])
    assert not torch.equal(latents[0], latents[3])
    limit = math.sqrt(6 / (5 * 9 + 6 * 9))
    assert 0.95 * limit < latents[0].abs().max() < limit


def test_replaced_parameters_are_refused_where_state_begins_at_random() -> None:
    """As DeepSpeed's ZeRO does: one flat slice in the place of a group's parameters."""
    optimizer = make("diode", [nn.Parameter(first_weight())])
    flat = nn.Parameter(torch.ones(64))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(64)
    with pytest.raises(ValueError, match="diode.*ShardedOptimizer"):
        optimizer.step()


@pytest.mark.parametrize("name", ["two_ema", "sgdat"])
def test_padding_of_a_foreign_slice_stays(name: str) -> None:
    """DeepSpeed's ZeRO fills its slices up with weights of 0, which have no gradient."""
    param = nn.Parameter(torch.tensor([1.0, -1.0, 0.0]))
    optimizer = make(name, [param])
    for _ in range(3):
        param.grad = torch.tensor([1.0, -1.0, 0.0])
        optimizer.step()
    assert param.tolist() == [-1.0, 1.0, 0.0]


def negate_(weight: torch.Tensor, grad: torch.Tensor, state: State, group: Group) -> None:
    weight.neg_()


@pytest.mark.parametrize("name", ["negate", "two_ema"])
def test_real_weights_become_signs_under_any_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a ShardedOptimizer, which packs them after their first update: also 0, and under a rule
    that does not look."""
    monkeypatch.setitem(RULES, "negate", Rule(name="negate", update_=negate_, state_keys=(), flips=True))
    monkeypatch.setitem(GROUPS, "negate", {})
    results = []
    for is_sharded in (False, True):
        param = nn.Parameter(torch.tensor([0.5, -0.25, 0.0, 0.0, 2.0, -1.0, 1.0]))
        optimizer: Any = make(name, [param])
        optimizer = ShardedOptimizer(optimizer) if is_sharded else optimizer
        for _ in range(2):
            param.grad = None
            (param * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, 0.0])).sum().backward()
            optimizer.step()
            assert param.abs().tolist() == [1.0] * 7
        results.append(param.tolist())
    assert results[0] == results[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_begins_with_the_same_random_state(copied: Callable[[Any], Any]) -> None:
    """The names, of which the random numbers are a function, go along; strange parameters are
    refused there too."""
    param = nn.Parameter(first_weight())
    optimizer = RoutedOptimizer([{"params": [("layer.weight", param)], "rule": "diode", **GROUPS["diode"]}])
    other_param, other = copied((param, optimizer))
    assert other_param is other.param_groups[0]["params"][0] is not param
    for weight, each in ((param, optimizer), (other_param, other)):
        weight.grad = gradients()[0]
        each.step()
    state = other.state[other_param]
    assert all(torch.equal(tensor, state[key]) for key, tensor in optimizer.state[param].items())
    flat = nn.Parameter(param.detach().flatten())
    flat.grad = torch.ones_like(flat)
    other.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="replaced"):
        other.step()
