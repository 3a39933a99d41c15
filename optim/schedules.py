"""Schedules of hyperparameters: pure functions of the 0-based step, and the object that writes them
into an optimizer.

The paper's code gives gamma, sigma, threshold and the Adam learning rate a Keras schedule each,
evaluated at the optimizer's own 0-based iteration: the first update uses schedule(0).
`HyperparameterScheduler` follows the protocol of `torch.optim.lr_scheduler` (construct after the
optimizer, `step()` after `optimizer.step()`), for any key of a group.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer

Kind = Literal["constant", "polynomial", "exponential", "cosine", "warmup_cosine", "stairs"]
TO_END = ("polynomial", "cosine", "warmup_cosine", "stairs")
"""Kinds that lead from `start` to `end`."""
BY_EPOCH = ("warmup_cosine", "stairs")
"""Kinds that end with the last epoch of whole batches; the others count epochs * images // batch
steps, a little longer."""
LARGEST = torch.finfo(torch.float32).max
"""Largest value of a hyperparameter: weights and their state are float32, and torch refuses to
combine them with more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Hyperparameter as a function of the 0-based step."""

    start: float
    """Value at step 0 (before warm-up)."""
    end: float = 0.0
    """Value at `num_steps` and after (all but constant and exponential)."""
    kind: Kind = "constant"
    """constant; polynomial: (start - end) (1 - t/num_steps)^power + end; exponential: start *
    rate^floor(t/num_steps) (staircase); cosine: half a cosine from start to end. warmup_cosine:
    linear from 0 to start, which the last of the warm-up steps has, then half a cosine to end, as
    QuickNet's code. stairs: linear from start to end in `stairs` equal stairs, the first of which
    is one below start and the last of which has end, as ReActNet's code."""
    num_steps: int | None = None
    """Length of the decay in steps (exponential: of one stair). None: `share` of the run."""
    share: float = 1.0
    """Length of the decay (exponential: of one stair) as a share of the run, where `num_steps` is
    None."""
    power: float = 1.0
    """Exponent of the polynomial; 1 is linear."""
    rate: float = 0.1
    """Factor of each exponential stair."""
    warmup_steps: int = 0
    """During the first N steps the value is multiplied by (t + 1) / N (warmup_cosine: is start *
    t / (N - 1))."""
    warmup_epochs: float = 0.0
    """Length of the warm-up in epochs of the run, in place of `warmup_steps` (warmup_cosine)."""
    stairs: int | None = None
    """Number of stairs (stairs). None: one per epoch."""
    delay_steps: int = 0
    """The value stays at `start` for N steps, after which t counts. The decay ends at the same step
    as without a delay, if `num_steps` is unset; a stair keeps its length."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind of a schedule must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps of a schedule must be at least 1, not {self.num_steps}")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share of a schedule must be in (0, 1], not {self.share}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps of a schedule must not be negative, not {self.warmup_steps}")
        if self.delay_steps < 0:
            raise ValueError(f"delay_steps of a schedule must not be negative, not {self.delay_steps}")
        if self.warmup_epochs and (self.kind != "warmup_cosine" or self.warmup_steps):
            raise ValueError(
                f"warmup_epochs of a schedule is {self.warmup_epochs}: it needs kind warmup_cosine, not {self.kind}, "
                f"and warmup_steps 0, not {self.warmup_steps}"
            )
        if self.stairs is not None and (self.kind != "stairs" or self.stairs < 1):
            raise ValueError(
                f"stairs of a schedule must be at least 1 and need kind stairs, not {self.stairs} with {self.kind}"
            )
        if self.kind in BY_EPOCH and (self.share != 1.0 or self.delay_steps):
            raise ValueError(f"a {self.kind} schedule lasts the whole run: leave out its share and delay_steps")
        for name in ("start", "end", "power", "rate", "warmup_epochs"):
            check_is_finite(f"{name} of a schedule", getattr(self, name))

    def over(self, num_steps: int, *, num_epochs: int = 1, steps_per_epoch: int | None = None) -> "Schedule":
        """Return this schedule with its length filled in if it is unset.

        Args:
            num_steps: epochs * images // batch of the run.
            num_epochs: of the run.
            steps_per_epoch: whole batches of an epoch. None: the run is one epoch.

        Raises:
            ValueError: it would end before its delay does, or grow beyond float32.
        """
        if self.kind in BY_EPOCH:
            steps_per_epoch = steps_per_epoch or num_steps
            return dataclasses.replace(
                self,
                num_steps=self.num_steps or num_epochs * steps_per_epoch,
                warmup_steps=self.warmup_steps or round(self.warmup_epochs * steps_per_epoch),
                warmup_epochs=0.0,
                stairs=self.stairs or num_epochs if self.kind == "stairs" else None,
            )
        if self.num_steps is not None:
            self._check_growth(num_steps)
            return self
        length = max(1, round(self.share * num_steps))
        if self.kind in ("polynomial", "cosine"):
            if self.delay_steps >= length:
                raise ValueError(
                    f"delay_steps of a schedule is {self.delay_steps}, but it ends after {length} steps: expected less"
                )
            length -= self.delay_steps
        filled = dataclasses.replace(self, num_steps=length)
        filled._check_growth(num_steps)
        return filled

    def _check_growth(self, num_steps: int) -> None:
        """Raise ValueError if the stairs of a rate above 1 leave the range of float32 within a
        run."""
        try:
            if self(num_steps) <= LARGEST:
                return
        except OverflowError:
            pass
        raise ValueError(
            f"a schedule from {self.start:g} that grows {self.rate:g} times every {self.num_steps:,} steps overflows "
            f"in a run of {num_steps:,} steps: lower its rate, or raise its num_steps or share"
        )

    def __call__(self, step: int) -> float:
        """Value at the 0-based `step`, in float64."""
        if self.kind == "warmup_cosine":
            return self._warmed_up(step)
        value = self._decayed(max(0, step - self.delay_steps))
        return value * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else value

    @property
    def top_step(self) -> int:
        """Return the step at which warmup_cosine has its `start`; 0 for the other kinds."""
        return self.warmup_steps if self.kind == "warmup_cosine" else 0

    @property
    def warm(self) -> float:
        """Return the value with which the schedule begins, without a warm-up."""
        return self.start if self.warmup_steps else self(0)

    def _decayed(self, step: int) -> float:
        if self.kind == "constant":
            return self.start
        if self.num_steps is None:
            raise ValueError(f"a {self.kind} schedule needs num_steps before it can be evaluated")
        if self.kind == "exponential":
            return float(self.start * self.rate ** (step // self.num_steps))
        if self.kind == "stairs":
            assert self.stairs is not None
            stair = min(step * self.stairs // self.num_steps + 1, self.stairs)
            return (self.start - self.end) * (1.0 - stair / self.stairs) + self.end
        done = min(step, self.num_steps) / self.num_steps
        if self.kind == "polynomial":
            return float((self.start - self.end) * (1.0 - done) ** self.power + self.end)
        return self._cosine(done)

    def _warmed_up(self, step: int) -> float:
        """larq-zoo's CosineDecayWithWarmup: the cosine starts one step after the warm-up and is one
        step shorter than what is left."""
        if self.num_steps is None or self.warmup_epochs:
            raise ValueError("a warmup_cosine schedule needs num_steps before it can be evaluated")
        if step < self.warmup_steps:
            return self.start * step / max(self.warmup_steps - 1, 1)
        length = max(self.num_steps - self.warmup_steps - 1, 1)
        return self._cosine(min(step - self.warmup_steps, length) / length)

    def _cosine(self, done: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))


def check_is_finite(name: str, value: float) -> None:
    """Raise ValueError unless `value` is at least 0 and finite in float32."""
    if not 0.0 <= value <= LARGEST:
        raise ValueError(f"{name} must be finite in float32 and not negative, not {value}")


def check_is_schedule(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a `Schedule`, as a plain number is not."""
    if not isinstance(value, Schedule):
        raise ValueError(f"{name} is {value!r}; expected a Schedule, such as constant(1e-4)")


def constant(value: float) -> Schedule:
    """Return a schedule with the same value at every step."""
    return Schedule(start=value)


def linear(start: float, end: float, num_steps: int | None = None) -> Schedule:
    """Return Keras' PolynomialDecay of power 1, as in all runs of the paper."""
    return Schedule(start=start, end=end, kind="polynomial", num_steps=num_steps)


class HyperparameterScheduler:
    """Writes scheduled values into the parameter groups of an optimizer.

    Args:
        optimizer: any optimizer whose groups have a key "name".
        schedules: group name -> hyperparameter -> schedule, every length filled in.

    On construction the groups get the values of step 0.

    Raises:
        ValueError: no group has such a name, or the group no such hyperparameter.
    """

    def __init__(self, optimizer: Optimizer, schedules: Mapping[str, Mapping[str, Schedule]]) -> None:
        groups = {group["name"]: group for group in optimizer.param_groups if "name" in group}
        if unknown := sorted(set(schedules) - set(groups)):
            raise ValueError(
                f"schedules for unknown parameter groups {unknown}; the groups are {sorted(groups)}, each by its "
                'key "name"'
            )
        for name, by_key in schedules.items():
            if unknown := sorted(set(by_key) - set(groups[name])):
                known = sorted(set(groups[name]) - {"name", "params", "param_names", "rule"})
                raise ValueError(f"schedules for {unknown}, which the group {name!r} does not have; it has {known}")
        self.optimizer = optimizer
        self.schedules = schedules
        self.num_steps_done = 0
        self._write()

    def _write(self) -> None:
        for group in self.optimizer.param_groups:
            for key, schedule in self.schedules.get(group.get("name", ""), {}).items():
                group[key] = schedule(self.num_steps_done)

    def step(self, **_: Any) -> None:
        """Count one optimizer step and write the values of the next (DeepSpeed passes keywords that
        are not used)."""
        self.num_steps_done += 1
        self._write()

    def state_dict(self) -> dict[str, int]:
        """Return the position; the schedules themselves belong to the configuration."""
        return {"num_steps_done": self.num_steps_done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the position of `state`."""
        self.num_steps_done = state["num_steps_done"]
        self._write()
