"""Bop2ndOrder: flip a binary weight when a normalised moving average of its gradient says so.

Paper: Suarez-Ramirez, Gonzalez-Mendoza, Chang, Ochoa-Ruiz, Duran-Vega: "A Bop and Beyond: A Second
Order Optimizer for Binarized Neural Networks", arXiv 2104.05124. Reference code:
CuauSuarez/Bop2ndOrder, branch `conference`, bnn_optimization/optimizers.py. With m, v = 0 at the
start, g the gradient with respect to the +-1 weight w:

    m <- m + gamma (g - m)
    v <- v + sigma (g^2 - v)
    r  = m / (sqrt(v) + 1e-10)                                          "none"
    r  = (m / gamma) / (sqrt(v / sigma) + 1e-10)                        "as_coded"
    r  = (m / (1-(1-gamma)^t)) / (sqrt(v / (1-(1-sigma)^t)) + 1e-10)    "adam", t = 1, 2, ...
    w <- -w where w r > threshold, +1 where w r = threshold exactly, else w

The correction "none" is the class `Bop2ndOrder` of the code, "as_coded" its class
`Bop2ndOrder_unbiased`, "adam" is Adam's. gamma and sigma are those of the step. So "adam" is exact
for constants only: after the published ImageNet schedules, gamma 1e-4 to 1e-9, it divides m by
0.0015, where 0.998 is what m has taken in, and r is 655 times as large.

The published ImageNet runs and 91.9 % on CIFAR-10 use "none", 91.4 % on CIFAR-10 "as_coded".
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bitfleet.optim.kernels.kernels import EPS, Correction, bias_corrections, check_correction, flip_packed_, root
from bitfleet.optim.rules.rule import Group, RoutedOptimizer, Rule, State, register
from bitfleet.optim.schedules import constant


def flip_(weight: Tensor, signal: Tensor, threshold: float, exp_avg: Tensor) -> None:
    """Set `weight` to S(-sgn(signal - threshold) * weight), S(x) = -1 for x < 0 else +1, in place.

    This is the official update in full: +-1 weights flip where `signal` = weight * ratio exceeds
    the threshold, an exact tie gives +1, and real-valued weights become their sign. A zero weight
    that never had a gradient is padding of a flat shard and stays.
    """
    to_minus = (signal - threshold) * weight > 0
    padding = (weight == 0) & (exp_avg == 0)
    weight.copy_(torch.where(padding, weight, torch.where(to_minus, -1.0, 1.0)))


@torch.no_grad()
def bop2ndorder_step_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    gamma: float,
    sigma: float,
    threshold: float,
    correction: Correction = "none",
    step: int = 1,
) -> None:
    """Apply one update in place, elementwise.

    Args:
        weight: any shape, +-1.
        grad: gradient with respect to `weight`, same shape.
        exp_avg: first moment m, fp32, same shape.
        exp_avg_sq: second moment v, fp32, same shape.
        gamma: rate of the first moment, in (0, 1].
        sigma: rate of the second moment, in (0, 1].
        threshold: flip above it, not negative.
        correction: see the module's docstring.
        step: 1-based number of this update; only "adam" uses it.
    """
    grad = grad.float()
    # Not lerp_ or addcmul_: fused multiply-adds would give other low bits in other kernels.
    exp_avg.add_((grad - exp_avg) * gamma)
    exp_avg_sq.add_((grad * grad - exp_avg_sq) * sigma)
    divisor, divisor_sq = bias_corrections(correction, gamma, sigma, step)
    if correction == "none":
        ratio = exp_avg / (root(exp_avg_sq) + EPS)
    else:
        ratio = (exp_avg / divisor) / (root(exp_avg_sq / divisor_sq) + EPS)
    flip_(weight, weight * ratio, threshold, exp_avg)


def _numbers(group: Group, step: int) -> dict[str, float]:
    numbers = {key: group[key] for key in ("gamma", "sigma", "threshold")}
    if group["correction"] == "none":
        return numbers
    divisors = bias_corrections(group["correction"], group["gamma"], group["sigma"], step)
    return numbers | dict(zip(("divisor", "divisor_sq"), divisors, strict=True))


def seed_average_(
    exp_avg: Tensor, weight: Tensor, mean_square: Tensor, *, rate: float, inertia: float, scale: float = 1.0
) -> None:
    """Fill a moving average of gradients as if it had made `weight` what it is, in place.

    Under the published thresholds w is -sign(m). Gradients of mean 0 and mean square v,
    uncorrelated, give m a standard deviation of sqrt(rate / 2) sqrt(v); m becomes -w times
    `inertia` of it.

    Args:
        exp_avg: m, any shape.
        weight: +-1, same shape.
        mean_square: v, same shape.
        rate: of the average.
        inertia: of the weights, not negative.
        scale: of what is averaged against the gradient.
    """
    exp_avg.copy_(weight * mean_square.sqrt() * (-inertia * scale * math.sqrt(rate / 2.0)))


def _seed_(weight: Tensor, mean_square: Tensor, state: State, group: Group, inertia: float) -> None:
    seed_average_(state["exp_avg"], weight, mean_square, rate=group["gamma"], inertia=inertia)
    state["exp_avg_sq"].copy_(mean_square)


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    bop2ndorder_step_(
        weight,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        gamma=group["gamma"],
        sigma=group["sigma"],
        threshold=group["threshold"],
        correction=group["correction"],
        step=int(state["step"]),
    )


def _ratio(state: State, group: Group) -> Tensor:
    if group["correction"] == "none":
        return state["exp_avg"] / (root(state["exp_avg_sq"]) + EPS)
    step = max(int(state["step"]), 1)
    divisor, divisor_sq = bias_corrections(group["correction"], group["gamma"], group["sigma"], step)
    return (state["exp_avg"] / divisor) / (root(state["exp_avg_sq"] / divisor_sq) + EPS)


register(
    Rule(
        name="bop2ndorder",
        update_=_update_,
        update_bits_=flip_packed_,
        state_keys=("exp_avg", "exp_avg_sq"),
        flips=True,
        # The class defaults of the official code.
        defaults={
            "gamma": constant(1e-6),
            "sigma": constant(1e-2),
            "threshold": constant(1e-6),
            "correction": "none",
        },
        scheduled=("gamma", "sigma", "threshold"),
        driven=("gamma", "threshold"),
        numbers=_numbers,
        seed_=_seed_,
        ratio=_ratio,
    )
)


class Bop2ndOrder(RoutedOptimizer):
    """Plain PyTorch optimizer for binary weights with the rule above.

    Args:
        params: parameters (or groups) with values +-1.
        gamma: rate of the first moment.
        sigma: rate of the second moment.
        threshold: flip above it.
        correction: "none", "as_coded" or "adam".

    State of each parameter: exp_avg, exp_avg_sq (fp32) and step. Hyperparameters live in the
    groups, so schedules write there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        gamma: float,
        sigma: float,
        threshold: float,
        correction: Correction = "none",
    ) -> None:
        check_correction(correction)
        defaults = {"gamma": gamma, "sigma": sigma, "threshold": threshold, "correction": correction}
        super().__init__(params, {"rule": "bop2ndorder", **defaults})
