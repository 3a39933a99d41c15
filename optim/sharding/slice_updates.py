"""Rules of +-1 weights on a slice of packed signs: by a kernel of their own, or chunk by chunk on unpacked weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bitfleet.optim.kernels.bits import pack_signs, unpack_signs
from bitfleet.optim.kernels.kernels import Rates, Slice, flip_packed_
from bitfleet.optim.rules.rule import RULES, Group, State

__all__ = ["CHUNK", "unless_nonfinite", "update_bits_"]

CHUNK = 262_144
"""Weights that a CPU unpacks at a time: they, their gradient and state stay in its cache. A multiple of 64."""


def _bop2ndorder(bits: Tensor, grad: Tensor, state: State, group: Group, finite: Tensor | None) -> None:
    divisors = (group["divisor"], group["divisor_sq"]) if "divisor" in group else None
    rates = Rates(group["gamma"], group["sigma"], group["threshold"], divisors)
    flip_packed_(Slice(bits, grad, state["exp_avg"], state["exp_avg_sq"]), rates, finite)


def _bop(bits: Tensor, grad: Tensor, state: State, group: Group, finite: Tensor | None) -> None:
    flip_packed_(Slice(bits, grad, state["exp_avg"]), Rates(group["gamma"], 1.0, group["threshold"]), finite)


KERNELS: dict[str, Callable[[Tensor, Tensor, State, Group, Tensor | None], None]] = {
    "bop2ndorder": _bop2ndorder,
    "bop": _bop,
}
"""Rules that never unpack the weights."""


def update_bits_(bits: Tensor, grad: Tensor, state: State, group: Group, finite: Tensor | None = None) -> None:
    """Apply the group's rule, which has `flips`, to packed weights, in place; the bits of the rule on whole tensors.

    Args:
        bits: uint8 [n / 8], the signs of n weights; n is a multiple of 8.
        grad: fp32 [n], gradient with respect to the +-1 weights.
        state: of the rule, fp32 [n] each, and "step".
        group: names the rule and holds its hyperparameters and its numbers of the step.
        finite: bool [] on the device: False leaves everything as it is. None is True.
    """
    if kernel := KERNELS.get(group["rule"]):
        kernel(bits, grad, state, group, finite)
        return
    if finite is None:
        _update_unpacked_(bits, grad, state, group)
        return
    tensors = [bits, *(tensor for key, tensor in state.items() if key != "step")]
    with unless_nonfinite(finite, tensors):
        _update_unpacked_(bits, grad, state, group)


@contextmanager
def unless_nonfinite(finite: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Undo on the way out what happened to `tensors` inside, where `finite` (bool []) is False; the host does not wait.

    For rules that know no such flag: costs a copy of each tensor and a pass over it.
    """
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))


def _update_unpacked_(bits: Tensor, grad: Tensor, state: State, group: Group) -> None:
    numel = grad.numel()
    size = min(CHUNK, numel) if grad.device.type == "cpu" else numel
    weights = torch.empty(size, device=grad.device)
    for low in range(0, numel, max(size, 1)):
        high = min(low + size, numel)
        here = bits[low // 8 : high // 8]
        part = {key: tensor if key == "step" else tensor[low:high] for key, tensor in state.items()}
        unpacked = unpack_signs(here, weights[: high - low])
        RULES[group["rule"]].update_(unpacked, grad[low:high], part, group)
        pack_signs(unpacked, out=here)
