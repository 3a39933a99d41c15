"""TRS: a controller that holds the rate at which weights change their sign to a schedule.

Paper: Lee, Jeon, Kim, Ham: "Scheduling Weight Transitions for Quantization-Aware Training", ICCV
2025, arXiv 2404.19248. Before the update of step t:

    k_t = fraction of the binary weights that the last update changed    0 before the first
    K_t = m K_(t-1) + (1 - m) k_t                                        "transition_rate"
    U_t = max(0, U_(t-1) + eta (R_t - K_t)),  eta = gain U_0             "latent_lr", as published
    U_t = U_(t-1) exp(gain (R_t - K_t))                                  "gamma"
    U_t = U_(t-1) exp(-gain (R_t - K_t))                                 "threshold"

and step t is made with U_t in place of the hyperparameter. The first update is made with U_0 and K
= 0; U_0 is what the configuration gives it. One k for all binary weights. R_t is a schedule, in the
paper a cosine from lambda to 0, lambda near 5e-3 (times sqrt(bits), here 1).

gamma and threshold are ours. Both act over decades and must stay above 0, so what the paper adds,
relative to U_0, is added to their logarithm: near U_0 it is the same. A higher threshold flips
less: its sign is reversed. They stay within a factor of 1e6 of U_0 (gamma also at most 1): beyond
it nothing changes any more, and the way back would be as long.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bitfleet.optim.kernels.bits import popcount
from bitfleet.optim.rules.rule import RULES, Group
from bitfleet.optim.schedules import LARGEST, TO_END, Schedule, check_is_schedule

Driven = Literal["latent_lr", "gamma", "threshold"]
KEY, RATE = "transitions", "transition_rate"
"""Keys of a group: its `Target`, and K."""
RANGE = 1e6
PART = 4096
"""Divisor of a count, which travels as two float32 (quotient and remainder): sums are exact up to
2^36 flips and 4096 ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransitionConfig:
    """Scheduled weight transitions (TRS, arXiv 2404.19248); needs sharding "bits", which counts the
    flips."""

    drives: Literal["off", "latent_lr", "gamma", "threshold"] = "off"
    """Hyperparameter to drive; its schedule must be a constant, the initial value. latent_lr of
    latent_adam and latent_sgd, gamma or threshold of bop and bop2ndorder."""
    target: Schedule = dataclasses.field(default_factory=lambda: Schedule(start=5e-3, kind="cosine"))
    """R, the fraction of the binary weights that each step is to flip; starts at the paper's
    lambda."""
    momentum: float = 0.99
    """m of the average over steps."""
    gain: float = 1.0
    """eta as a multiple of the hyperparameter's initial value; the paper's is 1."""

    def __post_init__(self) -> None:
        choices = ("off", *get_args(Driven))
        if self.drives not in choices:
            raise ValueError(f"optim.transitions.drives must be one of {', '.join(choices)}, not {self.drives!r}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optim.transitions.momentum must be in [0, 1), not {self.momentum}")
        if not 0.0 < self.gain <= LARGEST:
            raise ValueError(f"optim.transitions.gain must be finite in float32 and above 0, not {self.gain}")
        check_is_schedule("optim.transitions.target", self.target)
        if self.target.kind == "exponential" and self.target.rate > 1.0:
            raise ValueError(
                f"optim.transitions.target must not grow by stairs: its rate is {self.target.rate}, expected at most 1"
            )
        highest = max(self.target.start, self.target.end if self.target.kind in TO_END else 0.0)
        if highest > 1.0:
            raise ValueError(f"optim.transitions.target is a fraction, but reaches {highest}; expected at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Settings of the controller of a group; group["transitions"]."""

    drives: Driven
    schedule: Schedule
    """R, its length filled in."""
    momentum: float
    gain: float
    initial: float
    """U_0."""


def check_transitions(config: TransitionConfig, rule: str, driven: Schedule | None) -> None:
    """Raise ValueError unless `rule` has the hyperparameter that is driven, as a constant from
    which the controller can go.

    Args:
        config: the controller.
        rule: of the binary weights.
        driven: schedule of the hyperparameter; None where the rule has none.
    """
    if config.drives == "off":
        return
    name, rules = config.drives, [each for each, record in RULES.items() if config.drives in record.driven]
    if rule not in rules or driven is None:
        raise ValueError(f"optim.transitions.drives {name!r} belongs to the rules {' and '.join(rules)}, not to {rule}")
    if driven.kind != "constant" or driven.warmup_steps:
        raise ValueError(
            f"optim.{name} has a schedule, but optim.transitions drives it: expected a constant, its initial value"
        )
    if not driven.start > 0.0:
        raise ValueError(
            f"optim.{name} is {driven.start}, from where optim.transitions cannot drive it: expected above 0"
        )


def target_of(config: TransitionConfig, driven: Schedule, target: Schedule) -> Target:
    """Return the settings of a group from a checked configuration; `target` is its target with the
    length of the run."""
    assert config.drives != "off"
    return Target(
        drives=config.drives,
        schedule=target,
        momentum=config.momentum,
        gain=config.gain,
        initial=driven.start,
    )


def next_rate(rate: float, fraction: float, momentum: float) -> float:
    """K_t of K_(t-1) and k_t."""
    return momentum * rate + (1.0 - momentum) * fraction


def next_value(value: float, gap: float, target: Target) -> float:
    """U_t of U_(t-1) and R_t - K_t."""
    if target.drives == "latent_lr":
        return max(0.0, value + target.gain * target.initial * gap)
    exponent = target.gain * (gap if target.drives == "gamma" else -gap)
    moved = value * math.exp(min(exponent, 100.0))  # beyond any limit, and within a float
    low, high = target.initial / RANGE, target.initial * RANGE
    return min(max(moved, low), min(high, 1.0) if target.drives == "gamma" else high)


class TransitionController:
    """Counts this rank's flips and drives the groups that have a target. K and U live in the
    groups.

    Args:
        groups: parameter groups; those with the key "transitions" are driven.
        numel: binary weights of all ranks.
        device: where the flips are.
    """

    def __init__(self, groups: Sequence[Group], numel: int, device: torch.device) -> None:
        self.groups = [group for group in groups if KEY in group]
        self.numel = numel
        self._flips = torch.zeros((), dtype=torch.int64, device=device)
        for group in self.groups:
            group.setdefault(RATE, 0.0)

    def observe(self, _bucket: object, _grad: Tensor, flips: Tensor) -> None:
        """Count; an observer of `ShardedOptimizer`."""
        self._flips += popcount(flips)

    @property
    def flips(self) -> Tensor:
        """Flips of this rank in the last update, int64 []."""
        return self._flips

    def facts(self) -> Tensor:
        """Return the count as two fp32 numbers whose sums over the ranks are exact."""
        return torch.stack([self._flips // PART, self._flips % PART]).float()

    def drive(self, facts: Sequence[float], step: int, *, is_first: bool) -> None:
        """Write K and U of the 0-based `step` into the groups, and start a new count.

        Args:
            facts: sums of `facts` over the ranks.
            step: about to be made.
            is_first: no update was made before: K and U keep their initial values.
        """
        self._flips.zero_()
        if is_first:
            return
        quotient, remainder = map(int, facts)
        fraction = (PART * quotient + remainder) / max(self.numel, 1)
        for group in self.groups:
            target: Target = group[KEY]
            group[RATE] = next_rate(group[RATE], fraction, target.momentum)
            group[target.drives] = next_value(group[target.drives], target.schedule(step) - group[RATE], target)

    def state(self, flips: int) -> dict[str, Any]:
        """Return what is driven, K and U of each driven group, and the last update's `flips` of all
        ranks, for a checkpoint."""
        values = [[group[KEY].drives, group[RATE], group[group[KEY].drives]] for group in self.groups]
        return {"values": values, "flips": flips}

    def load(self, state: dict[str, Any], *, is_main_rank: bool) -> None:
        """Continue from `state` on any number of ranks.

        Raises:
            ValueError: something else is driven there.
        """
        saved, here = [each[0] for each in state["values"]], [group[KEY].drives for group in self.groups]
        if saved != here:
            raise ValueError(
                f"the saved transitions drive {saved}, here they drive {here}: continue with the "
                "optim.transitions of then"
            )
        for group, (_, rate, value) in zip(self.groups, state["values"], strict=True):
            group[RATE], group[group[KEY].drives] = rate, value
        self._flips.fill_(state["flips"] if is_main_rank else 0)


def controller_of(groups: Sequence[Group], numel: int, device: torch.device) -> TransitionController | None:
    """Return the controller of the groups that have a target, None if none has; see
    `TransitionController`."""
    return TransitionController(groups, numel, device) if any(KEY in group for group in groups) else None


def driven_values(groups: Sequence[Group]) -> dict[str, float]:
    """K and U with which the last step was made, by group key; empty where nothing is driven."""
    driven = [group for group in groups if KEY in group]
    return {key: group[key] for group in driven for key in (RATE, group[KEY].drives) if key in group}
