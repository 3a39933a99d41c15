"""Update rules, and an optimizer that applies one rule per parameter group.

DeepSpeed wants a single optimizer object, while a binarized network needs two rules: a bit-flipping
one for the +-1 weights and Adam for the rest (larq's CaseOptimizer). `RoutedOptimizer` looks up the
rule that each group names. Every rule is elementwise, so it may be given whole parameters or the
flat slices into which DeepSpeed's ZeRO cuts them.

State that does not start at 0 is filled by the rule's `begin_` before the first update of a
parameter, from random numbers that belong to the element (counter_random.py): the same however
parameters are cut. Which elements a slice of DeepSpeed's holds is not known here, so such a rule is
refused there.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitfleet.optim.rules.counter_random import uniform
from bitfleet.optim.rules.update_counts import UpdateCounts
from bitfleet.optim.schedules import Schedule

State = dict[str, Tensor]
Group = dict[str, Any]
Update = Callable[[Tensor, Tensor, State, Group], None]
BitsUpdate = Callable[[Tensor, Tensor, State, Group, Tensor | None], None]
Begin = Callable[[Tensor, Tensor, torch.Size, State, Group], None]
Seed = Callable[[Tensor, Tensor, State, Group, float], None]
Numbers = Callable[[Group, int], dict[str, float]]
Ratio = Callable[[State, Group], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Everything that bitfleet knows about an update rule; a file of optim/rules registers one.

    All functions are elementwise, so they may be given whole parameters or any slices of them.
    """

    name: str
    """Value of `optim.rule`, and of the key "rule" of a parameter group."""
    update_: Update
    """(weight, grad, state, group) -> None: one update in place. The group holds the
    hyperparameters of the step."""
    state_keys: tuple[str, ...]
    """fp32 tensors of the weight's shape that start at 0. The 0-dim tensor "step" comes on top."""
    flips: bool = False
    """Weights are +-1 and stay so: a sharded optimizer keeps and sends them as bits, else as
    values. Those that start as real values become the signs of what their first update leaves."""
    defaults: Mapping[str, Any] | None = None
    """Hyperparameters, fields of `OptimConfig`, and their defaults: a `Schedule`, or a value that
    stays. None: the rule is not one for binary weights, and `optim.rule` cannot name it."""
    scheduled: tuple[str, ...] = ()
    """Keys of the group that a schedule changes from step to step and that the run logs."""
    driven: tuple[str, ...] = ()
    """Hyperparameters that a controller may drive (transitions.py)."""
    numbers: Numbers | None = None
    """(group, step) -> everything that changes from step to step, by the key under which `update_`
    finds it in its group: floats, or 0-dim tensors where the device must not wait for the host.
    `step` is the 1-based number of the update. None: the update decides on the host, and cannot be
    part of a CUDA graph."""
    begin_: Begin | None = None
    """(weight, uniform, shape, state, group) -> None: fills the state of elements before their
    first update. `uniform` holds a number in (0, 1) per element (fp32), `shape` is that of the
    whole parameter; group["seed"] is the seed of the numbers."""
    seed_: Seed | None = None
    """(weight, mean_square, state, group, inertia) -> None: fills the state of weights that were
    trained before, in place of `begin_`, so that they stay what they are until gradients say
    otherwise. `mean_square` is that of some gradients (fp32), the group has "num_steps", the length
    of the run. See sharding/seeding.py."""
    update_bits_: BitsUpdate | None = None
    """(bits, grad, state, group, finite) -> None: `update_` on packed weights, uint8 [n / 8], in
    place; `finite` (bool [] on the device, None is True) False leaves everything as it is. None:
    weights are unpacked chunk by chunk for `update_`."""
    ratio: Ratio | None = None
    """(state, group) -> fp32 [n], what the update that led to `state` compared with
    group["threshold"]. None: the rule compares nothing, so diagnostics have no dead band and no
    histogram."""
    schedules: Callable[[Mapping[str, Any], int], dict[str, Schedule]] | None = None
    """(hyperparameters, num_steps) -> further keys of the group and their schedules."""
    check: Callable[[Mapping[str, Any]], None] | None = None
    """Raise ValueError for hyperparameters that do not go together."""


RULES: dict[str, Rule] = {}
"""Name -> rule, of every file of optim/rules and of any other code that calls `register`."""


def register(rule: Rule) -> None:
    """Make `rule` known by its name."""
    assert rule.name not in RULES, rule.name
    RULES[rule.name] = rule


def binary_rules() -> dict[str, Mapping[str, Any]]:
    """Name -> hyperparameters with their defaults, of every rule that `optim.rule` can name."""
    return {name: rule.defaults for name, rule in sorted(RULES.items()) if rule.defaults is not None}


def unchanged(*keys: str) -> Numbers:
    """Return a `Rule.numbers` for an update that takes `keys` from its group as they are."""
    return lambda group, step: {key: group[key] for key in keys}


def numbers_of(group: Group, step: int) -> dict[str, float]:
    """Return the numbers of the group's rule at the 1-based `step`; empty if it has no such
    function."""
    numbers = RULES[group["rule"]].numbers
    return {} if numbers is None else numbers(group, step)


def start_signs_(weight: Tensor) -> None:
    """Make weights their signs, in place, sign(0) = +1; what is not finite stays, so that the first
    step finds it."""
    weight.copy_(torch.where(weight.isfinite(), torch.where(weight >= 0, 1.0, -1.0), weight))


def names_of(number: int, group: Group) -> list[str]:
    """Return the names of the parameters of the `number`-th group: its "param_names", else running
    numbers."""
    return group.get("param_names") or [f"{number}.{index}" for index in range(len(group["params"]))]


def check_ranges(group: Group) -> None:
    """Raise ValueError for a hyperparameter of `group` with which a rule would train nonsense."""
    for name in ("gamma", "sigma", "alpha"):
        if name in group and not 0.0 < group[name] <= 1.0:
            raise ValueError(f"{name} must be in (0, 1], not {group[name]}")
    for name in ("threshold", "lr", "latent_lr"):
        if name in group and not group[name] >= 0.0:
            raise ValueError(f"{name} must not be negative, not {group[name]}")


def check_has_hyperparameters(group: Group) -> None:
    """Raise ValueError if `group` lacks a key that its rule reads; an update of no weights finds
    out."""
    rule, nothing = RULES[group["rule"]], torch.empty(0)
    state = {key: torch.empty(0) for key in rule.state_keys} | {"step": torch.ones(())}
    try:
        if rule.begin_ is not None:
            group["seed"]
        rule.update_(nothing, nothing, state, group | numbers_of(group, 1))
    except KeyError as error:
        raise ValueError(
            f"a group of the rule {rule.name} has no {error}, which the rule reads: put it into the group or the "
            "optimizer's defaults"
        ) from error


def check_same_rules(groups: Sequence[Group], saved: Sequence[Group]) -> None:
    """Raise ValueError unless the groups of a state_dict have the rules of `groups`: state of one
    rule means nothing to another, even under the same keys."""
    here, there = [group["rule"] for group in groups], [group.get("rule") for group in saved]
    if here != there:
        raise ValueError(
            f"the state is of groups with the rules {there}, here they are {here}: load it into an optimizer of "
            "those rules"
        )


class RoutedOptimizer(torch.optim.Optimizer):
    """Applies to each group the rule that its key "rule" names.

    Args:
        params: parameters, or groups; each group, or `defaults`, holds "rule" and that rule's
            hyperparameters.
        defaults: values for groups that do not set them.

    `step` is counted per parameter, never per call: DeepSpeed's ZeRO calls `step()` once for every
    group.
    """

    counts: UpdateCounts | None = None
    """Where set: updates are counted there."""

    def __init__(self, params: Iterable[Any], defaults: Group | None = None) -> None:
        self._names: dict[Tensor, str] = {}
        super().__init__(params, defaults or {})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch.optim.

        Raises:
            ValueError: it names no known rule, or a hyperparameter is out of range.
        """
        group = {**self.defaults, **param_group}
        if group.get("rule") not in RULES:
            raise ValueError(f"a parameter group names the rule {group.get('rule')!r}; known are {sorted(RULES)}")
        check_ranges(group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._names |= zip(group["params"], names_of(len(self.param_groups) - 1, group), strict=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of torch.optim, and the names: a copy or a pickle has those of its
        parameters."""
        return {**super().__getstate__(), "_names": self._names}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Raises:
            ValueError: the rule starts with random state, and the parameters were replaced after
                construction (DeepSpeed's ZeRO); or a group has transitions, or lacks what its rule
                reads.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "transitions" in group:
                raise ValueError(
                    "a group is driven by its transitions, which only ShardedOptimizer counts: wrap the optimizer"
                )
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self._state_of(param, group)
                if state["step"] == 0:
                    self._begin_(param, state, group)
                state["step"] += 1
                numbers = numbers_of(group, int(state["step"]))
                RULES[group["rule"]].update_(param, param.grad, state, group | numbers)
                if state["step"] == 1 and RULES[group["rule"]].flips:
                    # As a ShardedOptimizer, which packs them. A 0 without a gradient is padding of
                    # a flat slice.
                    is_padding = (param == 0) & (param.grad == 0)
                    param.copy_(torch.where(is_padding | param.isnan(), param, torch.where(param >= 0, 1.0, -1.0)))
                if self.counts is not None:
                    self.counts.add(self._names.get(param, group.get("name", "")), group["rule"], param.numel())
        return loss

    def _begin_(self, param: Tensor, state: State, group: Group) -> None:
        """Fill the state of a parameter where the rule asks for it, unless `start_signs` did."""
        check_has_hyperparameters(group)
        rule = RULES[group["rule"]]
        if rule.begin_ is None or any(bool(state[key].any()) for key in rule.state_keys):
            return
        if param not in self._names:
            raise ValueError(
                f"the rule {group['rule']} starts with random state for each parameter, but its parameters were "
                "replaced by others, as DeepSpeed's ZeRO does: use ShardedOptimizer or no sharding"
            )
        numbers = uniform(group["seed"], self._names[param], 0, param.numel(), param.device)
        rule.begin_(param, numbers.view(param.shape), param.shape, state, group)

    @torch.no_grad()
    def start_signs(self) -> None:
        """Make weights of rules that flip them their signs, before the first step; rules with
        latent weights start these from the real values."""
        for group in self.param_groups:
            rule = RULES[group["rule"]]
            for param in group["params"] if rule.flips else ():
                if not bool((param.abs() == 1).all()):
                    check_has_hyperparameters(group)
                    if rule.begin_ is not None:  # else no state: ZeRO puts other parameters into the groups
                        self._begin_(param, self._state_of(param, group), group)
                    start_signs_(param)

    def create_state(self) -> None:
        """Make the state of every parameter that has none, as before its first update: a checkpoint
        is read into it."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch.optim does, but keep state in fp32: torch casts it to the dtype of its
        parameter, and bf16 would round it.

        Raises:
            ValueError: it is of other rules, or of a ShardedOptimizer.
        """
        check_same_rules(self.param_groups, state_dict["param_groups"])
        if "state" not in state_dict:
            raise ValueError("the state is of a ShardedOptimizer, whose slices only another one can load")
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            saved: State = state_dict["state"].get(number, {})
            if param.dtype != torch.float32 and saved:
                self.state[param] |= {key: saved[key].to(param.device, torch.float32) for key in saved if key != "step"}

    def steps(self) -> dict[str, int]:
        """Updates that each parameter has had, by the names of `names_of`."""
        return {
            name: int(self.state[param]["step"]) if param in self.state else 0
            for number, group in enumerate(self.param_groups)
            for name, param in zip(names_of(number, group), group["params"], strict=True)
        }

    def load_steps(self, steps: dict[str, int]) -> None:
        """Set what `steps` returned; every parameter has state."""
        for number, group in enumerate(self.param_groups):
            for name, param in zip(names_of(number, group), group["params"], strict=True):
                self.state[param]["step"].fill_(steps[name])

    def _state_of(self, param: Tensor, group: Group) -> State:
        state: State = self.state[param]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, as in torch.optim: read without a device sync
            for key in RULES[group["rule"]].state_keys:
                state[key] = torch.zeros_like(param, dtype=torch.float32)
        return state
