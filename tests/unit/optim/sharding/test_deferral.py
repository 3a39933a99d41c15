"""A sharded step for which the host does not wait: the same bits, counted one step later."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.kernels import kernels
from bitfleet.optim.rules.adam import KERAS_DEFAULTS
from bitfleet.optim.rules.rule import RULES
from tests.host_reads import HostReads

SHAPES = ((30, 7), (129,), (64, 9, 3, 3))
BINARY: dict[str, dict[str, Any]] = {
    "bop": {"gamma": 0.1, "threshold": 0.05},
    "bop2ndorder": {"gamma": 0.1, "sigma": 0.03, "threshold": 0.2, "correction": "none"},
    "bop2ndorder corrected": {"gamma": 0.1, "sigma": 0.03, "threshold": 0.2, "correction": "adam"},
    "two_ema": {"gamma": 0.1, "alpha": 0.2},
    "sgdat": {"latent_lr": 0.1, "threshold": 0.01},
    "diode": {"gamma": 0.1, "alpha": 0.1, "latent_lr": 0.01, "seed": 1},
    "latent_sgd": {"latent_lr": 0.1, "momentum": 0.5, "seed": 1},
    "latent_adam": {"latent_lr": 0.01, "seed": 1},
    "bnew": {"latent_lr": 0.01, "rho": 0.0, "free": 1.0, "seed": 1},
}
ADAM: dict[str, Any] = {"rule": "keras_adam", **KERAS_DEFAULTS, "lr": 0.01}


def make(rule: str, **options: Any) -> tuple[list[nn.Parameter], ShardedOptimizer]:
    """Three binary and two full-precision parameters, in small buckets."""
    generator = torch.Generator().manual_seed(0)
    binary = [nn.Parameter(torch.randn(shape, generator=generator).sign()) for shape in SHAPES]
    real = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES[:2]]
    groups = [
        {"params": [(f"b{i}", param) for i, param in enumerate(binary)], "rule": rule.split()[0], **BINARY[rule]},
        {"params": [(f"r{i}", param) for i, param in enumerate(real)], **ADAM},
    ]
    return [*binary, *real], ShardedOptimizer(RoutedOptimizer(groups), bucket_numel=400, max_grad_norm=1.0, **options)


def backward(params: Sequence[nn.Parameter], step: int, *, factor: float | Tensor = 1.0, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    terms = [(param * torch.randn(param.shape, generator=generator)).sum() for param in params]
    loss = torch.stack(terms).sum() * factor
    (loss * torch.inf if bad else loss).backward()


def schedule(sharded: ShardedOptimizer, step: int) -> None:
    """Hyperparameters move from step to step."""
    for group in sharded.param_groups:
        for key in ("gamma", "threshold", "lr", "latent_lr"):
            if key in group:
                group[key] *= 0.97


def assert_equal_state(one: ShardedOptimizer, other: ShardedOptimizer) -> None:
    for mine, theirs in zip(one.buckets, other.buckets, strict=True):
        assert torch.equal(mine.weights, theirs.weights)
        for key, tensor in mine.state.items():
            assert torch.equal(tensor, theirs.state[key]), key


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("rule", BINARY)
def test_bits_of_a_step_that_waits(rule: str, has_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 0, 5, 6, 7 and 11 are not finite: alone, in a row, and before the first update."""
    if not has_kernel:
        monkeypatch.setattr(kernels, "kernel_library", lambda: None)
    params, waiting = make(rule, defers=False)
    others, deferred = make(rule, defers=True)
    for step in range(16):
        for each, optimizer in ((params, waiting), (others, deferred)):
            backward(each, step, bad=step in (0, 5, 6, 7, 11))
            schedule(optimizer, step)
            optimizer.step()
        assert_equal_state(waiting, deferred)
        if step in (5, 11):
            assert deferred._num_skipped_steps == waiting._num_skipped_steps - 1  # not known yet
        if step in (6, 7):
            assert deferred._num_skipped_steps == waiting._num_skipped_steps  # after one it waits
            assert deferred.num_skipped_in_a_row == step - 4
    assert deferred.num_skipped_steps == waiting.num_skipped_steps == 5
    assert deferred.steps() == waiting.steps() == dict.fromkeys(waiting.steps(), 11)
    assert deferred.num_steps == waiting.num_steps == 16
    waiting.close()
    deferred.close()


COUNTS: dict[str, Callable[[ShardedOptimizer], int]] = {
    "num_skipped_steps": lambda sharded: 3 - sharded.num_skipped_steps,
    "steps": lambda sharded: max(sharded.steps().values()),
    "state_dict": lambda sharded: max(sharded.state_dict()["steps"].values()),
    "gather_state": lambda sharded: max(int(state["step"]) for state in sharded.gather_state().values()),
}
"""Ways to ask for the updates that were made."""


@pytest.mark.parametrize("way", COUNTS)
def test_reading_the_counts_waits_for_the_last_step(way: str) -> None:
    params, sharded = make("bop2ndorder", defers=True)
    for step in range(3):
        backward(params, step, bad=step == 2)
        sharded.step()
    assert sharded._num_skipped_steps == 0
    assert COUNTS[way](sharded) == 2
    assert sharded._num_skipped_steps == 1
    sharded.close()


@pytest.mark.parametrize("rule", [name for name in BINARY if RULES[name.split()[0]].numbers])
def test_the_host_reads_nothing_in_a_step(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kernels", "bits"):  # what a GPU without Triton runs
        monkeypatch.setattr(f"bitfleet.optim.kernels.{module}.kernel_library", lambda: None)
    params, sharded = make(rule, defers=True, scales_loss=True)
    assert sharded.loss_scale is not None
    for step in range(2):  # the first one waits
        backward(params, step)
        sharded.step()
    with HostReads() as reads:
        for step in range(2, 5):
            backward(params, step, factor=sharded.loss_scale.value)
            schedule(sharded, step)
            sharded.step()
    assert reads.found == []
    with HostReads() as reads:
        sharded.defers = False
        backward(params, 5)
        sharded.step()
    assert reads.found  # the mode sees the reading of a step that waits
    sharded.close()


def test_loss_scale_is_taken_out_exactly() -> None:
    params, plain = make("bop2ndorder")
    others, scaled = make("bop2ndorder", scales_loss=True)
    assert scaled.loss_scale is not None
    for step in range(10):
        backward(params, step)
        backward(others, step, factor=scaled.loss_scale.value)
        plain.step()
        scaled.step()
    assert_equal_state(plain, scaled)


@pytest.mark.parametrize("defers", [False, True])
def test_loss_scale_halves_and_doubles(defers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitfleet.optim.sharding.loss_scale.GROWTH_STEPS", 3)
    params, sharded = make("bop", defers=defers, scales_loss=True)
    assert sharded.loss_scale is not None
    scales = []
    for step in range(12):
        backward(params, step, factor=sharded.loss_scale.value, bad=step in (1, 6))
        sharded.step()
        scales.append(float(sharded.loss_scale.value))
    first = 2.0**16
    expected = [1, 0.5, 0.5, 0.5, 1, 1, 0.5, 0.5, 0.5, 1, 1, 1]
    assert [scale / first for scale in scales] == expected
    other = make("bop", scales_loss=True)[1]
    other.load_state_dict(sharded.state_dict())
    assert other.loss_scale is not None
    assert other.loss_scale.state() == sharded.loss_scale.state() == [first, 2.0]


def test_a_gradient_that_fills_its_bucket_is_not_copied() -> None:
    """The largest layers have buckets of their own."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn((64, 9), generator=generator).sign())
    sharded = ShardedOptimizer(RoutedOptimizer([{"params": [("w", weight)], "rule": "bop", **BINARY["bop"]}]))
    seen: list[int] = []
    keep: Callable[[Tensor], None] = lambda param: seen.append(param.grad.data_ptr())  # type: ignore[union-attr]  # noqa: E731
    handle = weight.register_post_accumulate_grad_hook(keep)
    sharded._reduction.close()
    sharded._reduction._hooks = [weight.register_post_accumulate_grad_hook(sharded._reduction._hook(0, 0))]
    backward([weight], 0)
    assert sharded.buckets[0]._local is None
    assert sharded._reduction._reduced[0].data_ptr() == seen[0]
    handle.remove()
    sharded.step()
