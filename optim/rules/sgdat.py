"""SGDAT: stochastic gradient descent with an adaptive threshold.

Paper: Gu Shan et al., Neurocomputing 555:126431, 2023. Reference code: gushan/SGDAT; here without its options weight decay and
momentum. With M = 0 and n_flips = 0 at the start, g the gradient with respect to the +-1 weight w:

    M <- M - lr g
    w' = sign(M) where |M| > tau n_flips, else w
    n_flips <- n_flips + 1 where w' differs from w
    w <- w'

A weight that has flipped often needs a larger accumulator to flip again; the first gradient that is not 0 always sets it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bitfleet.optim.rules.bop2ndorder import check_threshold
from bitfleet.optim.rules.latent import check_latent_lr, walk
from bitfleet.optim.rules.rule import Group, RoutedOptimizer, State, rule, scheduled


@torch.no_grad()
def sgdat_step_(
    weight: Tensor, grad: Tensor, accumulator: Tensor, num_flips: Tensor, *, latent_lr: float, threshold: float
) -> None:
    """One update in place, elementwise.

    Args:
        weight: any shape, +-1; a real one becomes its sign.
        grad: gradient with respect to `weight`, same shape.
        accumulator: M, fp32, same shape.
        num_flips: n_flips, fp32, same shape; exact up to 2^24.
        latent_lr: learning rate lr of the accumulator.
        threshold: tau, by which each flip raises the weight's threshold; not negative.
    """
    accumulator.sub_(grad.float() * latent_lr)
    signs, before = torch.where(accumulator >= 0, 1.0, -1.0), weight.float().sign()
    flips = (accumulator.abs() > num_flips * threshold) & (signs != before)
    num_flips.add_(flips)
    weight.copy_(torch.where(flips, signs, before))


def _seed_(weight: Tensor, mean_square: Tensor, state: State, group: Group, inertia: float) -> None:
    level = inertia * group["latent_lr"] * walk(group["num_steps"])
    state["accumulator"].copy_(weight * mean_square.sqrt() * level)


@rule("sgdat", "accumulator", "num_flips", flips=True, numbers=scheduled("latent_lr", "threshold"), seed_=_seed_)
def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    sgdat_step_(
        weight,
        grad,
        state["accumulator"],
        state["num_flips"],
        latent_lr=group["latent_lr"],
        threshold=group["threshold"],
    )


class Sgdat(RoutedOptimizer):
    """The rule above as a plain PyTorch optimizer for binary weights.

    Args:
        params: parameters (or groups) with values +-1.
        latent_lr: learning rate of the accumulator.
        threshold: by which each flip raises the weight's threshold.

    State of each parameter: accumulator, num_flips (fp32) and step.
    """

    def __init__(self, params: Iterable[Any], *, latent_lr: float = 1e-4, threshold: float = 1e-7) -> None:
        check_latent_lr(latent_lr)
        check_threshold(threshold)
        super().__init__(params, {"rule": "sgdat", "latent_lr": latent_lr, "threshold": threshold})
