"""A sharded optimizer next to a plain one that is fed the same reduced gradients."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitfleet.optim import HyperparameterScheduler, OptimConfig, RoutedOptimizer, ShardedOptimizer, build_optimizer
from bitfleet.optim.kernels.kernels import Correction
from bitfleet.optim.rules.rule import RULES
from bitfleet.optim.schedules import constant
from bitfleet.optim.sharding.buckets import tree_sum

SIZES = [(1001,), (7,), (64,), (13, 5, 2), (1,), (3, 3, 16, 16)]
NUM_BINARY = len(SIZES)
NUM_STEPS = 50
LIVELY: dict[str, Any] = {
    "gamma": constant(1e-2),
    "sigma": constant(1e-3),
    "threshold": constant(1e-2),
    "alpha": constant(1e-2),
    "latent_lr": constant(1e-2),
}
"""Hyperparameters with which weights flip in a few steps; those that are not here have their
defaults."""
Gradient = Callable[[int, int, int], Tensor | None]
"""(step, replica, index of the parameter) -> its gradient."""


def lively(rule: str, **changes: Any) -> OptimConfig:
    """Return a configuration of `rule` under which weights flip in a few steps."""
    config = OptimConfig(rule=rule, lr=constant(1e-2), weight_decay=1e-3, decayed=("p*",), **changes)  # type: ignore[arg-type]
    return dataclasses.replace(config, **{name: LIVELY[name] for name in config.hyperparameters if name in LIVELY})


def _every_rule() -> Iterator[tuple[str, OptimConfig]]:
    for rule in sorted(RULES):
        with contextlib.suppress(ValueError):  # a rule that is not for binary weights
            OptimConfig(rule=rule)  # type: ignore[arg-type]
            config = lively(rule)
            corrections = get_args(Correction) if "correction" in config.hyperparameters else ("none",)
            for correction in corrections:
                yield f"{rule}-{correction}", lively(rule, correction=correction)


EVERY_RULE = dict(_every_rule())
"""Rule and correction -> configuration, for every registered rule of binary weights."""
BOP, BOP2 = EVERY_RULE["bop-none"], EVERY_RULE["bop2ndorder-none"]


def generator(*key: int) -> torch.Generator:
    """Return a generator that is the same on every rank."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def make_params(seed: int, *, real: bool = False) -> list[nn.Parameter]:
    """Make binary parameters of all SIZES, optionally real-valued at first, then the same shapes in
    full precision."""
    signs = [torch.randint(0, 2, size, generator=generator(seed, i)).float() * 2 - 1 for i, size in enumerate(SIZES)]
    if real:
        signs = [sign * 0.1 * torch.rand(sign.shape, generator=generator(seed, 5, i)) for i, sign in enumerate(signs)]
    values = [torch.randn(size, generator=generator(seed, 99, i)) for i, size in enumerate(SIZES)]
    return [nn.Parameter(tensor) for tensor in signs + values]


def make_plain(
    params: Sequence[nn.Parameter], config: OptimConfig, num_steps: int = NUM_STEPS
) -> tuple[RoutedOptimizer, HyperparameterScheduler]:
    """Make the plain optimizer of parameters p0, p1, ..., and the schedules of its groups."""
    module = nn.Module()
    for index, param in enumerate(params):
        param.binary = index < NUM_BINARY  # type: ignore[attr-defined]
        module.register_parameter(f"p{index}", param)
    optimizer, schedules = build_optimizer(module, config, num_steps=num_steps, seed=3)
    return optimizer, HyperparameterScheduler(optimizer, schedules)


def draw(step: int, replica: int, index: int) -> Tensor:
    """Return noise around a direction that stays."""
    size = SIZES[index % NUM_BINARY]
    noise = torch.randn(size, generator=generator(step, replica, index))
    return noise + 0.3 * torch.randn(size, generator=generator(7, index))


def unused_somewhere(step: int, replica: int, index: int) -> Tensor | None:
    """Leave out p1 but for every third step, p4 but for replica 0, p8 always, and p3 of odd
    replicas in even steps."""
    left_out = (
        (index == 1 and step % 3)
        or (index == 4 and replica > 0)
        or index == 8
        or (index == 3 and not step % 2 * replica % 2)
    )
    return None if left_out else draw(step, replica, index)


def backward(params: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    """Give each parameter exactly this gradient, through autograd."""
    terms = [(param * grad).sum() for param, grad in zip(params, grads, strict=True) if grad is not None]
    torch.autograd.backward(torch.stack(terms).sum())


def reduce(grads: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """Return the mean over all replicas in the order of the tree; None if no replica has a
    gradient."""
    if all(grad is None for grad in grads):
        return None
    return tree_sum([torch.zeros_like(like) if grad is None else grad for grad in grads]) / len(grads)


class Twins:
    """A sharded optimizer over the ranks, and on each rank a plain one over equal parameters.

    Args:
        config: rule and hyperparameters of both.
        local_replicas: backward passes per rank and step.
        real: binary weights start as real values.
        num_steps: length of the schedules.
        frozen: indices of parameters that need no gradient.
        options: those of ShardedOptimizer.
    """

    def __init__(
        self,
        config: OptimConfig = BOP2,
        *,
        local_replicas: int = 1,
        real: bool = False,
        num_steps: int = NUM_STEPS,
        frozen: Sequence[int] = (),
        **options: Any,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.num_replicas = local_replicas * self.world_size
        self.local_replicas = range(self.rank * local_replicas, (self.rank + 1) * local_replicas)
        # The weights of rank 0 are broadcast.
        self.mine, self.theirs = make_params(self.rank, real=real), make_params(0, real=real)
        wrapped, self._schedules = make_plain(self.mine, config, num_steps)
        self.plain, self._plain_schedules = make_plain(self.theirs, config, num_steps)
        for index in frozen:
            self.mine[index].requires_grad_(False)
            self.theirs[index].requires_grad_(False)
        self.sharded = ShardedOptimizer(wrapped, num_replicas=self.num_replicas, **options)
        self.num_done = 0

    def step(self, gradient: Gradient = draw) -> None:
        """Update both with the gradients of all replicas."""
        for replica in self.local_replicas:
            backward(self.mine, [gradient(self.num_done, replica, index) for index in range(len(self.mine))])
        for index, param in enumerate(self.theirs):
            grads = [gradient(self.num_done, replica, index) for replica in range(self.num_replicas)]
            param.grad = reduce(grads, param)
        self.update()

    def update(self) -> None:
        """Update both with the gradients that they have."""
        self.sharded.step()
        self.plain.step()
        self._schedules.step()
        self._plain_schedules.step()
        self.num_done += 1

    def assert_equal(self) -> None:
        """Compare every bit of weights and state."""
        state = self.sharded.gather_state()
        for index, (a, b) in enumerate(zip(self.mine, self.theirs, strict=True)):
            assert torch.equal(a, b), f"weights of p{index}"
            for key, value in self.plain.state[b].items():
                assert torch.equal(state[f"p{index}"][key], value), f"{key} of p{index}"
