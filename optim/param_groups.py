"""Assign each parameter to a group, and so to an update rule.

The layers mark a binary weight with `weight.binary = True`; this file is the only reader of the
mark. Every trainable parameter ends in exactly one group; a pattern that selects nothing is an
error, because it is a misspelt name.
"""

import fnmatch
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from bitfleet.optim.rules.rule import RULES, Group, names_of

BINARY = "binary"
FULL_PRECISION = "full_precision"
DECAYED = "full_precision_decayed"


def is_binary(param: nn.Parameter) -> bool:
    """Return True if the layer that owns `param` marked it as a tensor of +-1."""
    return bool(getattr(param, "binary", False))


def check_patterns(name: str, patterns: Sequence[str]) -> None:
    """Raise ValueError if `patterns` is a string: it would be read as one pattern per letter."""
    if isinstance(patterns, str):
        raise ValueError(f"{name} is {patterns!r}; expected a sequence of patterns, such as ({patterns!r},)")


def param_groups(model: nn.Module, *, decayed: Sequence[str] = ()) -> list[Group]:
    """Split the trainable parameters of `model` into the groups binary, full_precision and
    full_precision_decayed.

    Args:
        model: its binary weights carry the mark.
        decayed: shell patterns of the full-precision parameters that have weight decay.

    Returns:
        Groups {"name", "params": [(parameter name, parameter), ...]}, empty ones left out; tied
        parameters count once.

    Raises:
        ValueError: a pattern matches no full-precision parameter, or nothing is trainable.
    """
    check_patterns("decayed", decayed)
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {BINARY: [], FULL_PRECISION: [], DECAYED: []}
    unused = set(decayed)
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        matching = {pattern for pattern in decayed if fnmatch.fnmatchcase(name, pattern)}
        if is_binary(param):
            groups[BINARY].append((name, param))
        else:
            unused -= matching
            groups[DECAYED if matching else FULL_PRECISION].append((name, param))
    if unused:
        names = [name for name, _ in groups[FULL_PRECISION] + groups[DECAYED]]
        raise ValueError(f"no full-precision parameter is called {sorted(unused)}; there are {names}")
    if not any(groups.values()):
        raise ValueError("the model has no trainable parameter")
    return [{"name": name, "params": params} for name, params in groups.items() if params]


def check_claims(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise ValueError, naming the parameter, unless each trainable one is in exactly one group of
    `optimizer`."""
    claims: dict[int, int] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            claims[id(param)] = claims.get(id(param), 0) + 1
    for name, param in model.named_parameters():
        count = claims.pop(id(param), 0)
        if param.requires_grad and count != 1:
            raise ValueError(f"parameter {name} is claimed by {count} parameter groups instead of one")
    if claims:
        raise ValueError(f"the optimizer holds {len(claims)} parameters that are not the model's")


def routing_table(optimizer: Optimizer) -> str:
    """Return a table of name, shape, group, rule, count and bytes of optimizer state (unsharded)
    per parameter.

    A last line says so where binary weights start as real values.
    """
    rows = [("parameter", "shape", "group", "rule", "weights", "state bytes")]
    totals: dict[str, tuple[int, int]] = {}
    for number, group in enumerate(optimizer.param_groups):
        group_name = group.get("name", str(number))
        for name, param in zip(names_of(number, group), group["params"], strict=True):
            state_bytes = 4 * len(RULES[group["rule"]].state_keys) * param.numel()
            shape = "x".join(map(str, param.shape))
            rows.append((name, shape, group_name, group["rule"], f"{param.numel():,}", f"{state_bytes:,}"))
            count, size = totals.get(group_name, (0, 0))
            totals[group_name] = (count + param.numel(), size + state_bytes)
    for group_name, (count, size) in totals.items():
        rows.append(("total", "", group_name, "", f"{count:,}", f"{size:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
        lines.append("  ".join(cells))
    if starts_real(optimizer):
        lines.append("The binary weights start as real values; their first update makes them +-1.")
    return "\n".join(lines)


def starts_real(optimizer: Optimizer) -> bool:
    """Return True if a rule that flips weights has some that are still real, before their first
    update."""
    flipped = (group["params"] for group in optimizer.param_groups if RULES[group["rule"]].flips)
    return any(not bool((param.detach().abs() == 1).all()) for params in flipped for param in params)
