"""A sharded optimizer on one rank that is used wrongly: the error says how to go on."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.optim import Bop, OptimConfig, ShardedOptimizer, build_optimizer


def signs(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).sign())


def sharded_bop(*params: nn.Parameter, bucket_numel: int = 64) -> ShardedOptimizer:
    return ShardedOptimizer(Bop(params, gamma=0.5, threshold=0.01), bucket_numel=bucket_numel)


def backward(*params: nn.Parameter, factor: float = 1.0) -> None:
    torch.stack([(factor * param).sum() for param in params]).sum().backward()


def moments(sharded: ShardedOptimizer) -> list[Tensor]:
    return [state["exp_avg"] for state in sharded.gather_state().values()]


def test_one_backward_too_many_can_be_forgotten() -> None:
    params, others = (signs(8, 8), signs(70)), (signs(8, 8), signs(70))
    sharded, clean = sharded_bop(*params), sharded_bop(*others)
    backward(*params, factor=5.0)
    backward(*params, factor=7.0)
    with pytest.raises(ValueError, match=r"step\(\) after 2 of 1 backward passes .* zero_grad\(\)"):
        sharded.step()
    sharded.zero_grad()
    backward(*params, factor=3.0)  # a batch that is skipped
    sharded.zero_grad()
    for _ in range(2):
        for each, optimizer in ((params, sharded), (others, clean)):
            backward(*each)
            optimizer.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(params, others, strict=True))
    assert all(torch.equal(*pair) for pair in zip(moments(sharded), moments(clean), strict=True))


def test_replaced_parameters_are_named_as_the_cause() -> None:
    model = nn.Linear(8, 8, bias=False)
    sharded = sharded_bop(model.weight)
    model.load_state_dict({"weight": torch.ones(8, 8)}, assign=True)
    backward(model.weight)
    with pytest.raises(ValueError, match=r"0 of 1 backward passes.*load_state_dict\(assign=True\) replaces them"):
        sharded.step()


def test_what_has_left_for_other_ranks_cannot_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    param = signs(8, 8)
    sharded = sharded_bop(param)
    backward(param)
    monkeypatch.setattr(sharded._reduction, "world_size", 2)
    with pytest.raises(ValueError, match="make the step, or start again from a checkpoint"):
        sharded.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0, or None, not -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm .* not nan"),
        ({"num_replicas": -1}, "num_replicas must be a multiple of the 1 ranks, or None, not -1"),
        ({"num_replicas": 0}, "num_replicas .* not 0"),
        ({"check_every": 0}, "check_every must be at least 1, or None, not 0"),
        ({"check_every": -3}, "check_every .* not -3"),
        ({"bucket_numel": -5}, "bucket_numel must be at least 1, not -5"),
        ({"grad_dtype": torch.float16}, "grad_dtype must be torch.float32 or torch.bfloat16, not torch.float16"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedOptimizer(Bop([signs(4)], gamma=0.5, threshold=0.01), **options)


def test_only_a_routed_optimizer_can_be_sharded() -> None:
    with pytest.raises(ValueError, match="Adam .*RoutedOptimizer"):
        ShardedOptimizer(torch.optim.Adam([signs(4)]))  # type: ignore[arg-type]


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        sharded_bop(signs(4)).step(lambda: 0.0)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused(duplicate: Any) -> None:
    with pytest.raises(ValueError, match=r"ShardedOptimizer cannot be copied or pickled.*state_dict\(\)"):
        duplicate(sharded_bop(signs(4)))


def sharded_linear(rule: str) -> ShardedOptimizer:
    model = nn.Linear(8, 8, bias=False)
    model.weight.binary = True  # type: ignore[attr-defined]
    return ShardedOptimizer(build_optimizer(model, OptimConfig(rule=rule), num_steps=10)[0])


def test_state_of_another_rule_is_refused() -> None:
    """bnew and bop2ndorder have the same keys of state."""
    sharded, other = sharded_linear("bnew"), sharded_linear("bop2ndorder")
    with pytest.raises(ValueError, match=r"rules \['bop2ndorder'\], here they are \['bnew'\]"):
        sharded.load_state_dict(other.state_dict())
    assert sharded.param_groups[0]["rule"] == "bnew"


@pytest.mark.parametrize("numel", [1, 8])
def test_state_of_another_size_is_refused(numel: int) -> None:
    """It has the same names; a single element would be copied into all."""
    mine, theirs = signs(16), signs(numel)
    sharded, other = sharded_bop(mine), sharded_bop(theirs)
    backward(theirs)
    other.step()
    with pytest.raises(ValueError, match=f"exp_avg/0.0/0 has {numel} elements there and 16 here"):
        sharded.load_state_dict(other.state_dict())
    assert sharded.steps() == {"0.0": 0}
    assert not moments(sharded)[0].any()


def test_sharded_and_plain_state_do_not_mix() -> None:
    plain = Bop([signs(4)], gamma=0.5, threshold=0.01)
    sharded = sharded_bop(signs(4))
    with pytest.raises(ValueError, match="state is not of a ShardedOptimizer"):
        sharded.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="state is of a ShardedOptimizer"):
        plain.load_state_dict(sharded.state_dict())
