"""Seed optimizer state for weights that were trained before, so that a run that starts from a file
keeps what they learned.

With moments of 0 the ratio of the first step is far above any published threshold, and half of the
weights flip at once. An average of some gradients would not help: half of them are noise of the
wrong sign. What is loaded must be in the state: each rule's `seed_` fills it as noise of the
measured size would have left it, with the sign of the weight. Full-precision parameters get Adam's
moments of the same gradients, else its first step would move each of them by the whole learning
rate. SGD starts with a velocity of 0.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitfleet.optim.rules.rule import numbers_of
from bitfleet.optim.schedules import Schedule
from bitfleet.optim.sharding.buckets import Bucket
from bitfleet.optim.sharding.optimizer import ShardedOptimizer

__all__ = ["Seeding"]


class Seeding:
    """Takes in the gradients of some steps, which update nothing, and fills the state of a new
    optimizer.

    Args:
        sharded: before its first step. Every rank does the same.
        inertia: how firmly weights of +-1 keep their signs, see `seed_average_`.
        num_steps: of the run.
        schedules: group name -> hyperparameter -> schedule. During a warm-up the group has a
            smaller value than the state is to be used with.
    """

    def __init__(
        self,
        sharded: ShardedOptimizer,
        *,
        inertia: float,
        num_steps: int,
        schedules: Mapping[str, Mapping[str, Schedule]],
    ) -> None:
        self._sharded, self._inertia, self._num_steps = sharded, inertia, num_steps
        self._schedules = schedules
        self.num_taken = 0
        """Steps whose gradients were finite."""
        self._squares = [torch.zeros(bucket.slice_numel, device=bucket.weights.device) for bucket in sharded.buckets]

    @torch.no_grad()
    def take(self) -> bool:
        """Take in the gradients of a step whose backward passes have been run; False if one of them
        is not finite."""
        grads, used = self._sharded.take_gradients()
        if not bool(self._sharded.finite):
            return False
        for bucket, grad, squares, flags in zip(self._sharded.buckets, grads, self._squares, used, strict=True):
            if bucket.binary:
                squares.add_(grad.square())
            elif bucket.group["rule"] in ("keras_adam", "adam"):
                _average_(bucket, grad, flags)
        self.num_taken += 1
        return True

    @torch.no_grad()
    def finish(self) -> None:
        """Fill the state of the rules that flip weights.

        Raises:
            ValueError: no gradients were taken in.
        """
        if self.num_taken == 0:
            raise ValueError(
                "finish() of a Seeding after 0 steps with finite gradients: run backward and take() before it"
            )
        for bucket, squares in zip(self._sharded.buckets, self._squares, strict=True):
            seed_ = bucket.rule.seed_
            if seed_ is None:
                continue
            scheduled = self._schedules.get(bucket.group.get("name", ""), {})
            warm = {key: schedule.warm for key, schedule in scheduled.items()}
            group = bucket.group | warm | {"num_steps": self._num_steps}
            seed_(bucket.owned(0, bucket.slice_numel), squares / self.num_taken, bucket.state, group, self._inertia)


def _average_(bucket: Bucket, grad: Tensor, used: Sequence[bool]) -> None:
    """Let Adam's moments take in a gradient, as an update with a learning rate of 0 does."""
    for run in bucket.advance(used):
        bucket.update_(grad, run, numbers_of(bucket.group | {"lr": 0.0}, run.step), None)
