"""The optimizer part of a run's configuration, and what is built from it."""

import dataclasses
from typing import Literal

from torch import nn

from bitfleet.optim.adam import KERAS_DEFAULTS
from bitfleet.optim.bop2ndorder import Correction
from bitfleet.optim.param_groups import BINARY, DECAYED, FULL_PRECISION, check_claims, param_groups
from bitfleet.optim.routed import Group, RoutedOptimizer
from bitfleet.optim.schedules import HyperparameterScheduler, Schedule, constant


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Rule and schedules. Schedules without a length run over epochs * training images // global batch steps."""

    rule: Literal["bop2ndorder", "bop"] = "bop2ndorder"
    """Rule of the binary weights."""
    correction: Correction = "none"
    """Bias correction of bop2ndorder: none, as_coded (the official "unbiased" class) or adam."""
    gamma: Schedule = dataclasses.field(default_factory=lambda: constant(1e-6))
    """Rate of the first moment; the class default of the official code."""
    sigma: Schedule = dataclasses.field(default_factory=lambda: constant(1e-2))
    """Rate of the second moment (bop2ndorder); the class default of the official code."""
    threshold: Schedule = dataclasses.field(default_factory=lambda: constant(1e-6))
    """Flip above it; the class default of the official code."""
    lr: Schedule = dataclasses.field(default_factory=lambda: constant(1e-3))
    """Learning rate of Adam, which trains the full-precision parameters."""
    weight_decay: float = 0.0
    """L2 factor on `decayed`, added to the gradient as weight_decay * w (Keras' l2(x) is weight_decay = 2 x)."""
    decayed: tuple[str, ...] = ()
    """Shell patterns of the parameters that have weight decay."""

    def __post_init__(self) -> None:
        for name in ("gamma", "sigma"):
            schedule: Schedule = getattr(self, name)
            largest = max(schedule.start, schedule.end if schedule.kind in ("polynomial", "cosine") else 0.0)
            if schedule.kind == "exponential" and schedule.rate > 1.0:
                raise ValueError(
                    f"optim.{name} must not grow by stairs: its rate is {schedule.rate}, expected at most 1"
                )
            if not 0.0 < largest <= 1.0:
                raise ValueError(f"optim.{name} must stay in (0, 1], but reaches {largest}")
            if self.correction != "none" and schedule.kind in ("polynomial", "cosine") and schedule.end == 0.0:
                raise ValueError(f"optim.{name} must not end at 0: the correction {self.correction!r} divides by it")
            if self.correction != "none" and schedule.kind == "exponential" and schedule.rate == 0.0:
                raise ValueError(f"optim.{name}.rate must not be 0: the correction {self.correction!r} divides by it")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"optim.weight_decay must not be negative, not {self.weight_decay}")
        if (self.weight_decay > 0.0) != bool(self.decayed):
            raise ValueError("optim.weight_decay and optim.decayed go together: one of them is set without the other")
        if self.rule == "bop" and self.correction != "none":
            raise ValueError(f'optim.correction belongs to bop2ndorder; rule bop wants "none", not {self.correction!r}')


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, num_steps: int
) -> tuple[RoutedOptimizer, dict[str, dict[str, Schedule]]]:
    """The optimizer of `model` and the schedules of its groups.

    Args:
        model: its binary weights carry the mark; it may have none, or nothing else.
        config: rule and schedules.
        num_steps: length of the schedules that do not state theirs.

    Returns:
        The optimizer, whose groups hold the values of step 0, and group name -> hyperparameter -> schedule for
        `HyperparameterScheduler`.
    """
    binary: Group = {"rule": config.rule}
    schedules = {BINARY: {"gamma": config.gamma, "threshold": config.threshold}}
    if config.rule == "bop2ndorder":
        binary["correction"] = config.correction
        schedules[BINARY]["sigma"] = config.sigma
    adam: Group = {"rule": "keras_adam", **KERAS_DEFAULTS}
    settings = {BINARY: binary, FULL_PRECISION: adam, DECAYED: {**adam, "weight_decay": config.weight_decay}}
    schedules[FULL_PRECISION] = schedules[DECAYED] = {"lr": config.lr}

    groups = [group | settings[group["name"]] for group in param_groups(model, decayed=config.decayed)]
    optimizer = RoutedOptimizer(groups)
    check_claims(model, optimizer)
    used = {
        group["name"]: {key: schedule.over(num_steps) for key, schedule in schedules[group["name"]].items()}
        for group in optimizer.param_groups
    }
    HyperparameterScheduler(optimizer, used)
    return optimizer, used
