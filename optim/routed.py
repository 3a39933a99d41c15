"""One optimizer, one update rule per parameter group.

DeepSpeed wants a single optimizer object, while a binarized network needs two rules: a bit-flipping one for the +-1 weights and
Adam for the rest (larq's CaseOptimizer). `RoutedOptimizer` looks up the rule that each group names. Every rule is elementwise,
so it may be given whole parameters or the flat slices into which DeepSpeed's ZeRO cuts them.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Group = dict[str, Any]
Update = Callable[[Tensor, Tensor, State, Group], None]


class Rule(NamedTuple):
    """An elementwise update: (weight, grad, state, group) -> None, in place."""

    update_: Update
    state_keys: tuple[str, ...]
    """fp32 tensors of the weight's shape that start at 0. The 0-dim tensor `step` comes on top."""


RULES: dict[str, Rule] = {}


def rule(name: str, *state_keys: str) -> Callable[[Update], Update]:
    """Register an update function under the name that parameter groups use."""

    def register(update_: Update) -> Update:
        assert name not in RULES, name
        RULES[name] = Rule(update_, state_keys)
        return update_

    return register


class RoutedOptimizer(torch.optim.Optimizer):
    """Applies to each group the rule that its key "rule" names.

    Args:
        params: parameters, or groups; each group, or `defaults`, holds "rule" and that rule's hyperparameters.
        defaults: values for groups that do not set them.

    `step` is counted per parameter, never per call: DeepSpeed's ZeRO calls `step()` once for every group.
    """

    def __init__(self, params: Iterable[Any], defaults: Group | None = None) -> None:
        super().__init__(params, defaults or {})
        for group in self.param_groups:
            if group.get("rule") not in RULES:
                raise ValueError(f"a parameter group names the rule {group.get('rule')!r}; known are {sorted(RULES)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self._state_of(param, group)
                state["step"] += 1
                RULES[group["rule"]].update_(param, param.grad, state, group)
        return loss

    def create_state(self) -> None:
        """Make the state of every parameter that has none, as before its first update: a checkpoint is read into it."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state_of(param, group)

    def steps(self) -> dict[str, int]:
        """Updates that each parameter has had; groups need "param_names"."""
        return {
            name: int(self.state[param]["step"]) if param in self.state else 0
            for group in self.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }

    def load_steps(self, steps: dict[str, int]) -> None:
        """Set what `steps` returned; every parameter has state."""
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                self.state[param]["step"].fill_(steps[name])

    def _state_of(self, param: Tensor, group: Group) -> State:
        state: State = self.state[param]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, as in torch.optim: read without a device sync
            for key in RULES[group["rule"]].state_keys:
                state[key] = torch.zeros_like(param, dtype=torch.float32)
        return state
