"""The sharded optimizer against a plain one: the same bits, whatever the rule, the gradients and
the number of ranks."""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitfleet.optim import Bop, Bop2ndOrder, OptimConfig, RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.rules.adam import KERAS_DEFAULTS
from bitfleet.optim.schedules import constant
from bitfleet.optim.transitions import Target, next_rate, next_value
from tests.distributed.on_ranks.rounded import rounded_sums
from tests.distributed.on_ranks.twins import (
    BOP,
    BOP2,
    EVERY_RULE,
    NUM_BINARY,
    SIZES,
    Twins,
    backward,
    draw,
    make_params,
    make_plain,
    reduce,
    unused_somewhere,
)
from tests.golden import recipe

GOLDEN = Path(__file__).parents[2] / "golden"
WORLD_SIZE = int(os.environ["WORLD_SIZE"])
FEW_RANKS = pytest.mark.skipif(WORLD_SIZE > 2, reason="does not depend on the number of ranks")
every_rule = pytest.mark.parametrize("config", EVERY_RULE.values(), ids=EVERY_RULE)


def sharded_alone(params: Sequence[nn.Parameter], config: OptimConfig = BOP, **options: Any) -> ShardedOptimizer:
    return ShardedOptimizer(make_plain(params, config)[0], **options)


def own_gradients(step: int) -> list[Tensor | None]:
    """Return this rank's gradients."""
    return [draw(step, dist.get_rank(), index) for index in range(2 * NUM_BINARY)]


def train(num_steps: int, config: OptimConfig, gradient: Any = draw, **options: Any) -> None:
    """Train twins, whose weights must change and be equal at the end."""
    twins = Twins(config, num_steps=num_steps, **options)
    for step in range(num_steps):
        twins.step(gradient)
        if step == 0 and options.get("real"):
            twins.assert_equal()
            twins.sharded.check_agreement()
    twins.assert_equal()
    assert all(param.grad is None for param in twins.mine)
    assert not torch.equal(twins.mine[0], make_params(0, real=options.get("real", False))[0])


@every_rule
def test_bits_of_the_plain_optimizer(config: OptimConfig) -> None:
    train(25, config)


def test_parameters_that_fill_many_buckets() -> None:
    train(20, BOP2, bucket_numel=100)
    train(10, BOP2, bucket_numel=100, local_replicas=4)
    train(10, BOP2, unused_somewhere, bucket_numel=100, local_replicas=2)


@every_rule
def test_parameters_without_gradients_somewhere(config: OptimConfig) -> None:
    train(15, config, unused_somewhere, bucket_numel=2000, local_replicas=2)


@FEW_RANKS
@every_rule
def test_real_weights_at_the_start(config: OptimConfig) -> None:
    train(5, config, real=True)
    train(6, config, unused_somewhere, real=True, bucket_numel=2000)


def test_weights_that_freeze_in_the_run() -> None:
    config = dataclasses.replace(EVERY_RULE["bnew-none"], rho=1e-2, frozen_from=0.5)
    train(20, config, unused_somewhere, bucket_numel=1000)


def test_frozen_and_tied_parameters() -> None:
    """Frozen parameters among others keep their values; one that is used twice gets the sum of both
    gradients."""
    twins = Twins(frozen=(0, 8))
    for step in range(10):
        grads = own_gradients(step)
        terms = [(param * grad).sum() + (2 * param * grad).sum() for param, grad in zip(twins.mine, grads, strict=True)]
        torch.autograd.backward(torch.stack(terms).sum())
        for index, param in enumerate(twins.theirs):
            draws = [draw(step, rank, index) for rank in range(WORLD_SIZE)]
            param.grad = reduce([grad + 2 * grad for grad in draws], param) if param.requires_grad else None
        twins.update()
    twins.assert_equal()
    assert torch.equal(twins.mine[0], make_params(0)[0])


def test_misuse_is_named() -> None:
    params = make_params(0)
    sharded, grads = sharded_alone(params), own_gradients(0)
    with pytest.raises(ValueError, match="0 of 1"):
        sharded.step()
    with pytest.raises(ValueError, match="parameter group"):
        sharded.add_param_group({"params": [nn.Parameter(torch.ones(3))], "rule": "keras_adam", **KERAS_DEFAULTS})
    params[4].requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad .*p4"):
        sharded.step()
    params[4].requires_grad_(True)
    moved = params[9].data
    params[9].data = moved.clone()
    with pytest.raises(ValueError, match="p9"):
        sharded.step()
    params[9].data = moved
    sharded_alone(params).close()
    with pytest.raises(ValueError, match=r"p\d+"):  # the other one made its own views
        sharded.step()
    sharded.close()
    again = sharded_alone(params)
    backward(params, grads)
    again.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_second_gradient_of_reentrant_checkpoints_is_refused(reentrant: bool) -> None:
    """A module in two reentrant checkpoints gets a part of its gradient from each; the first may
    have left already."""
    shared, head = nn.Linear(8, 8), nn.Linear(8, 1)
    named = [(f"p{index}", param) for index, param in enumerate([*shared.parameters(), *head.parameters()])]
    group = {"params": named, "rule": "keras_adam", "lr": 1e-2, **KERAS_DEFAULTS}
    sharded = ShardedOptimizer(RoutedOptimizer([group]), bucket_numel=8)
    hidden = torch.randn(4, 8, requires_grad=True)
    for _ in range(2):
        hidden = checkpoint(shared, hidden, use_reentrant=reentrant)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="p1 .*two gradients") if reentrant else nullcontext():
        head(hidden).square().mean().backward()
        sharded.step()
    # What has left already: the next optimizer's messages to the same ranks would be taken for it.
    for flight in sharded._reduction._flights.values():
        flight.result()
    sharded.close()
    dist.barrier()


class Raises(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("planted")


def test_failed_backward_can_be_forgotten() -> None:
    """While replicas are missing no gradient has left: zero_grad() starts the step again."""
    twins = Twins(local_replicas=2)
    with pytest.raises(ArithmeticError, match="planted"):
        (Raises.apply(twins.mine[0]).sum() + 3 * twins.mine[1].sum()).backward()
    twins.sharded.zero_grad()
    twins.step()
    twins.assert_equal()


def test_bf16_gradients_are_rounded_where_they_leave_a_rank_and_summed_in_fp32() -> None:
    twins = Twins(grad_dtype=torch.bfloat16)
    owners = {
        segment.param: torch.arange(segment.start, segment.end) // bucket.slice_numel
        for bucket in twins.sharded.buckets
        for segment in bucket.segments
    }
    for step in range(20):
        backward(twins.mine, own_gradients(step))
        for index, (param, like) in enumerate(zip(twins.theirs, twins.mine, strict=True)):
            grads = [draw(step, rank, index) for rank in range(WORLD_SIZE)]
            if WORLD_SIZE & (WORLD_SIZE - 1):  # all-to-all
                param.grad = reduce([grad.bfloat16().float() for grad in grads], param)
            else:
                sums = torch.stack(rounded_sums(grads)).view(WORLD_SIZE, -1)
                mean = sums.gather(0, owners[like][None])[0] / WORLD_SIZE
                param.grad = mean.view(param.shape)
        twins.update()
    twins.assert_equal()


def test_clipping_is_of_full_precision_parameters_only() -> None:
    twins = Twins(max_grad_norm=0.5)
    backward(twins.mine, own_gradients(0))
    for index, param in enumerate(twins.theirs):
        param.grad = reduce([draw(0, rank, index) for rank in range(WORLD_SIZE)], param)
    assert nn.utils.clip_grad_norm_(twins.theirs[NUM_BINARY:], 0.5) > 0.5
    twins.update()
    state = twins.sharded.gather_state()
    for index, param in enumerate(twins.theirs):
        expected = twins.plain.state[param]["exp_avg"]
        if index < NUM_BINARY:
            assert torch.equal(state[f"p{index}"]["exp_avg"], expected)
        else:
            torch.testing.assert_close(state[f"p{index}"]["exp_avg"], expected)


def test_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    params = make_params(0)
    sharded = sharded_alone(params)
    for step in range(3):
        before = [param.detach().clone() for param in params]
        grads = own_gradients(step)
        if step == 1 and dist.get_rank() == WORLD_SIZE - 1:
            grads[2] = torch.full(SIZES[2], torch.inf)
        backward(params, grads)
        sharded.step()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        assert unchanged == (step == 1)
    assert sharded.num_skipped_steps == 1
    assert sharded.nonfinite == ([] if sharded.defers else ["p2"])  # a deferred step has no names
    assert all(tensor.isfinite().all() for state in sharded.gather_state().values() for tensor in state.values())


@pytest.mark.skipif(WORLD_SIZE == 1, reason="compares ranks")
def test_planted_flip_is_named() -> None:
    """Two wrong signs and one wrong value on the last rank."""
    params, last = make_params(0), WORLD_SIZE - 1
    sharded = sharded_alone(params, check_every=2)
    for step in range(3):
        backward(params, own_gradients(step))
        if step == 2 and dist.get_rank() == last:
            params[0].data[345] *= -1
            params[0].data[700] *= -1
            params[11].data[0, 1, 2, 3] += 1
        if step < 2:
            sharded.step()
    with pytest.raises(RuntimeError, match=rf"step 2: rank {last}: p0 .* 345; rank {last}: p11 .* 291$"):
        sharded.step()


@FEW_RANKS
@every_rule
def test_saved_shard_continues_exactly(config: OptimConfig, folder: Path) -> None:
    """The state of one optimizer, given to a fresh one with another hyperparameter, continues with
    the same bits."""
    first, second = Twins(config), Twins(config)
    for _ in range(6):
        first.step(unused_somewhere)
    path = folder / f"shard{first.rank}"
    torch.save(first.sharded.state_dict(), path)
    with torch.no_grad():
        for a, b in zip(second.mine, first.mine, strict=True):
            a.copy_(b)
    key = next(key for key, value in first.sharded.param_groups[0].items() if isinstance(value, float))
    second.sharded.param_groups[0][key] = 0.5
    second.sharded.load_state_dict(torch.load(path))
    for step in range(6, 12):
        for twins in (first, second):
            backward(twins.mine, [unused_somewhere(step, twins.rank, index) for index in range(len(twins.mine))])
            twins.sharded.step()
    assert all(torch.equal(a, b) for a, b in zip(first.mine, second.mine, strict=True))
    expected = first.sharded.gather_state()
    for name, state in second.sharded.gather_state().items():
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in state.items()), name


def test_transitions_count_the_flips_of_all_ranks() -> None:
    """The controller's rate and value are those computed from the flips of the plain optimizer."""
    twins = Twins(BOP, bucket_numel=1000)
    twins.sharded.close()
    target = Target(drives="gamma", schedule=constant(0.05), momentum=0.5, gain=10.0, initial=1e-2)
    driven = make_plain(twins.mine, BOP)[0]
    driven.param_groups[0]["transitions"] = target
    sharded = twins.sharded = ShardedOptimizer(driven, bucket_numel=1000)
    group, binary = twins.plain.param_groups[0], twins.theirs[:NUM_BINARY]
    rate, changed, numel = 0.0, 0, sum(param.numel() for param in binary)
    gamma = group["gamma"]
    for step in range(20):
        if step:
            rate = next_rate(rate, changed / numel, target.momentum)
            gamma = next_value(gamma, 0.05 - rate, target)
        group["gamma"] = gamma
        before = [param.detach().clone() for param in binary]
        twins.step()
        changed = sum(int((a != b).sum()) for a, b in zip(before, binary, strict=True))
    twins.assert_equal()
    state = sharded.transition_state()
    assert state == {"values": [["gamma", rate, gamma]], "flips": changed}
    assert gamma != 1e-2
    assert changed > 0
    sharded.load_transition_state(state)
    assert sharded.transition_state() == state  # counted once, not by every rank


@pytest.mark.skipif(WORLD_SIZE == 3, reason="the mean of equal gradients is not exact")
@pytest.mark.parametrize("trajectory", recipe.TRAJ, ids=lambda trajectory: trajectory["name"])
def test_recorded_trajectory_of_the_official_code(trajectory: dict[str, Any]) -> None:
    """Every rank has the same gradient, whose mean is itself."""
    recorded = np.load(GOLDEN / f"opt_{trajectory['name']}.npz")
    weight = nn.Parameter(torch.from_numpy(recipe.w0(trajectory)))
    gamma, sigma, threshold = recorded["hyper"][0].tolist()
    corrections = {"bop2": "none", "bop2u_rescale": "as_coded", "bop2u_adam": "adam"}
    if trajectory["variant"] == "bop":
        plain: RoutedOptimizer = Bop([weight], gamma=gamma, threshold=threshold)
    else:
        correction: Any = corrections[trajectory["variant"]]
        plain = Bop2ndOrder([weight], gamma=gamma, sigma=sigma, threshold=threshold, correction=correction)
    sharded = ShardedOptimizer(plain)
    exact = np.ones(weight.numel(), dtype=bool)
    exact[recorded["near_tie"]] = False
    for step, grad in enumerate(recipe.grads(trajectory)):
        values = dict(zip(("gamma", "sigma", "threshold"), recorded["hyper"][step].tolist(), strict=True))
        plain.param_groups[0].update({key: values[key] for key in values if key in plain.param_groups[0]})
        backward([weight], [torch.from_numpy(grad)])
        sharded.step()
        if step + 1 in recipe.SNAP_STEPS:
            snap = recipe.SNAP_STEPS.index(step + 1)
            signs = np.unpackbits(recorded["w"][snap], bitorder="big")[: weight.numel()].astype(bool)
            assert np.array_equal((weight.detach().numpy().reshape(-1) > 0)[exact], signs[exact])
