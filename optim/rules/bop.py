"""Bop: flip a binary weight when a moving average of its gradient passes a threshold.

Paper: Helwegen, Widdicombe, Geiger, Liu, Cheng, Nusselder: "Latent Weights Do Not Exist: Rethinking
Binarized Neural Network Optimization", arXiv 1906.02107. Reference code: larq, larq/optimizers.py.
With m = 0 at the start:

    m <- m + gamma (g - m)
    w <- -w where w m > threshold, +1 where w m = threshold exactly, else w
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bitfleet.optim.kernels.kernels import flip_packed_
from bitfleet.optim.rules.bop2ndorder import flip_, seed_average_
from bitfleet.optim.rules.rule import Group, RoutedOptimizer, Rule, State, register, unchanged
from bitfleet.optim.schedules import constant


@torch.no_grad()
def bop_step_(weight: Tensor, grad: Tensor, exp_avg: Tensor, *, gamma: float, threshold: float) -> None:
    """Apply one update in place, elementwise.

    Args:
        weight: any shape, +-1.
        grad: gradient with respect to `weight`, same shape.
        exp_avg: moment m, fp32, same shape.
        gamma: rate of the moment, in (0, 1].
        threshold: flip above it, not negative. Unlike Bop2ndOrder's it has the scale of the
            gradient.
    """
    exp_avg.add_((grad.float() - exp_avg) * gamma)
    flip_(weight, weight * exp_avg, threshold, exp_avg)


def _seed_(weight: Tensor, mean_square: Tensor, state: State, group: Group, inertia: float) -> None:
    seed_average_(state["exp_avg"], weight, mean_square, rate=group["gamma"], inertia=inertia)


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    bop_step_(weight, grad, state["exp_avg"], gamma=group["gamma"], threshold=group["threshold"])


register(
    Rule(
        name="bop",
        update_=_update_,
        update_bits_=flip_packed_,
        state_keys=("exp_avg",),
        flips=True,
        defaults={"gamma": constant(1e-6), "threshold": constant(1e-6)},
        scheduled=("gamma", "threshold"),
        driven=("gamma", "threshold"),
        numbers=unchanged("gamma", "threshold"),
        seed_=_seed_,
        ratio=lambda state, group: state["exp_avg"],
    )
)


class Bop(RoutedOptimizer):
    """Plain PyTorch optimizer for binary weights with the rule above.

    Args:
        params: parameters (or groups) with values +-1.
        gamma: rate of the moment.
        threshold: flip above it.

    State of each parameter: exp_avg (fp32) and step.
    """

    def __init__(self, params: Iterable[Any], *, gamma: float, threshold: float) -> None:
        super().__init__(params, {"rule": "bop", "gamma": gamma, "threshold": threshold})
