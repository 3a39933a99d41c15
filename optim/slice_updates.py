"""Rules of +-1 weights on a slice of packed signs: by a kernel of their own, or chunk by chunk on unpacked weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from bitfleet.optim.bits import pack_signs, unpack_signs
from bitfleet.optim.kernels import bop2ndorder_bits_, bop_bits_
from bitfleet.optim.routed import RULES, Group, State

__all__ = ["CHUNK", "update_bits_"]

CHUNK = 262_144
"""Weights that a CPU unpacks at a time: they, their gradient and state stay in its cache. A multiple of 64."""


def _bop2ndorder(bits: Tensor, grad: Tensor, state: State, group: Group) -> None:
    bop2ndorder_bits_(
        bits,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        gamma=group["gamma"],
        sigma=group["sigma"],
        threshold=group["threshold"],
        correction=group["correction"],
        step=int(state["step"]),
    )


def _bop(bits: Tensor, grad: Tensor, state: State, group: Group) -> None:
    bop_bits_(bits, grad, state["exp_avg"], gamma=group["gamma"], threshold=group["threshold"])


KERNELS: dict[str, Callable[[Tensor, Tensor, State, Group], None]] = {"bop2ndorder": _bop2ndorder, "bop": _bop}
"""Rules that never unpack the weights."""


def update_bits_(bits: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """Apply the group's rule, which has `flips`, to packed weights, in place; the bits of the rule on whole tensors.

    Args:
        bits: uint8 [n / 8], the signs of n weights; n is a multiple of 8.
        grad: fp32 [n], gradient with respect to the +-1 weights.
        state: of the rule, fp32 [n] each, and "step".
        group: names the rule and holds its hyperparameters.
    """
    if kernel := KERNELS.get(group["rule"]):
        kernel(bits, grad, state, group)
        return
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
