"""The update rules against trajectories recorded from the paper's own code (tolerances: the
recording's README)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitfleet.optim import Bop, Bop2ndOrder, HyperparameterScheduler, RoutedOptimizer, Schedule, ShardedOptimizer
from tests.golden import recipe

GOLDEN = Path(__file__).parents[1] / "golden"
CORRECTIONS = {"bop2": "none", "bop2u_rescale": "as_coded", "bop2u_adam": "adam"}


def make_optimizer(variant: str, weight: nn.Parameter, gamma: float, sigma: Any, threshold: float) -> RoutedOptimizer:
    if variant == "bop":
        return Bop([weight], gamma=gamma, threshold=threshold)
    correction: Any = CORRECTIONS[variant]
    return Bop2ndOrder([weight], gamma=gamma, sigma=sigma, threshold=threshold, correction=correction)


def steps(
    trajectory: dict[str, Any], hyper: np.ndarray
) -> Iterator[tuple[int, np.ndarray, dict[str, Any], np.ndarray, np.ndarray]]:
    """Run a recorded trajectory and yield (1-based step, gradient, state, weight, mask of flips),
    all flat.

    The hyperparameters are the recorded ones: Keras evaluates its schedules in float32, where the
    start of sigma's comes out as 9.9996e-6 instead of 1e-5.
    """
    weight = nn.Parameter(torch.from_numpy(recipe.w0(trajectory)))
    optimizer = make_optimizer(trajectory["variant"], weight, *hyper[0].tolist())
    for step, grad in enumerate(recipe.grads(trajectory), start=1):
        values = dict(zip(("gamma", "sigma", "threshold"), hyper[step - 1].tolist(), strict=True))
        optimizer.param_groups[0].update({key: values[key] for key in values if key in optimizer.param_groups[0]})
        weight.grad = torch.from_numpy(grad)
        before = weight.detach().numpy().reshape(-1).copy()
        optimizer.step()
        after = weight.detach().numpy().reshape(-1)
        # A real weight of the start has not flipped where its sign stays; 0 counts, as in the
        # recording.
        yield step, grad.reshape(-1), optimizer.state[weight], after, np.sign(before) != np.sign(after)


@pytest.mark.parametrize("trajectory", recipe.TRAJ, ids=lambda trajectory: trajectory["name"])
def test_trajectory_equals_official_code(trajectory: dict[str, Any]) -> None:
    golden = np.load(GOLDEN / f"opt_{trajectory['name']}.npz")
    exact = np.ones(int(np.prod(trajectory["shape"])), dtype=bool)
    exact[golden["near_tie"]] = False
    mean_abs = np.zeros(exact.size)
    for step, grad, state, weight, flips in steps(trajectory, golden["hyper"]):
        mean_abs += float(golden["hyper"][step - 1, 0]) * (np.abs(grad.astype(np.float64)) - mean_abs)
        assert flips[exact].sum() == golden["flips_excl"][step - 1]
        if step not in recipe.SNAP_STEPS:
            continue
        snap = recipe.SNAP_STEPS.index(step)
        # The recording packed the most significant bit first.
        signs = np.unpackbits(golden["w"][snap], bitorder="big")[: exact.size].astype(bool)
        assert np.array_equal((weight > 0)[exact], signs[exact])
        assert int(state["step"]) == step
        exp_avg = state["exp_avg"].numpy().reshape(-1).astype(np.float64)
        assert (np.abs(exp_avg - golden["m"][snap]) <= 3e-5 * mean_abs).all()
        if trajectory["variant"] != "bop":
            exp_avg_sq = state["exp_avg_sq"].numpy().reshape(-1).astype(np.float64)
            expected = golden["v"][snap].astype(np.float64)
            assert (np.abs(exp_avg_sq - expected) <= 3e-5 * expected + 1e-35).all()
    assert set(np.unique(weight)) == {-1.0, 1.0}


def test_sharded_rule_compares_with_the_real_start() -> None:
    (trajectory,) = (each for each in recipe.TRAJ if each["name"] == "bop2_realw0")
    golden = np.load(GOLDEN / "opt_bop2_realw0.npz")
    plain, sharded = (nn.Parameter(torch.from_numpy(recipe.w0(trajectory))) for _ in range(2))
    first, other = (make_optimizer("bop2", weight, *golden["hyper"][0].tolist()) for weight in (plain, sharded))
    optimizers = first, ShardedOptimizer(other)
    for grad, hyper in zip(recipe.grads(trajectory), golden["hyper"], strict=False):
        for weight, optimizer in zip((plain, sharded), optimizers, strict=True):
            optimizer.param_groups[0].update(zip(("gamma", "sigma", "threshold"), hyper.tolist(), strict=True))
            (weight * torch.from_numpy(grad)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(plain, sharded)
        assert set(plain.unique().tolist()) == {-1.0, 1.0}


TIES = json.loads((GOLDEN / "opt_ties.json").read_text())


@pytest.mark.parametrize("case", TIES, ids=lambda case: case["note"][:40])
def test_exact_tie_becomes_plus_one(case: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.tensor(case["w"], dtype=torch.float32))
    optimizer = make_optimizer(case["variant"], weight, case["gamma"], case["sigma"], case["tau"])
    weight.grad = torch.tensor(case["g"], dtype=torch.float32)
    optimizer.step()
    assert weight.detach().tolist() == case["w_new"]


def test_padding_of_a_flat_shard_stays() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -1.0, 0.0, 0.0]))
    optimizer = Bop2ndOrder([weight], gamma=0.5, sigma=0.5, threshold=0.0)
    for _ in range(3):
        weight.grad = torch.tensor([1.0, 1.0, 0.0, 0.0])
        optimizer.step()
    assert weight.detach().tolist() == [-1.0, -1.0, 0.0, 0.0]


def test_adam_equals_keras() -> None:
    fixtures = np.load(GOLDEN / "fixtures.npz")
    weight = nn.Parameter(torch.from_numpy(fixtures["adam_w0"].copy()))
    group = {
        "params": [weight],
        "name": "full_precision",
        "rule": "keras_adam",
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
    }
    optimizer = RoutedOptimizer([group | {"eps": float(fixtures["adam_eps"]), "lr": 0.0}])
    lr = Schedule(start=1e-2)
    scheduler = HyperparameterScheduler(optimizer, {"full_precision": {"lr": lr}})
    for grad in fixtures["adam_g"]:
        weight.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(weight.detach().numpy(), fixtures["adam_w10"], rtol=1e-5, atol=1e-6)
