"""SGDAT: stochastic gradient descent with an adaptive threshold.

Paper: Gu Shan et al., Neurocomputing 555:126431, 2023. Reference code: gushan/SGDAT; here without
its options weight decay and momentum. With M = 0 and n_flips = 0 at the start, g the gradient with
respect to the +-1 weight w:

    M <- M - lr g
    w' = sign(M) where |M| > tau n_flips, else w
    n_flips <- n_flips + 1 where w' differs from w
    w <- w'

A weight that has flipped often needs a larger accumulator to flip again; the first gradient that is
not 0 always sets it.
"""

import torch
from torch import Tensor

from bitfleet.optim.rules.latent import walk
from bitfleet.optim.rules.rule import Group, Rule, State, register, unchanged
from bitfleet.optim.schedules import constant


@torch.no_grad()
def sgdat_step_(
    weight: Tensor, grad: Tensor, accumulator: Tensor, num_flips: Tensor, *, latent_lr: float, threshold: float
) -> None:
    """Apply one update in place, elementwise.

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


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    sgdat_step_(
        weight,
        grad,
        state["accumulator"],
        state["num_flips"],
        latent_lr=group["latent_lr"],
        threshold=group["threshold"],
    )


register(
    Rule(
        name="sgdat",
        update_=_update_,
        state_keys=("accumulator", "num_flips"),
        flips=True,
        # The official code's learning rate; the threshold is that of its runs.
        defaults={"latent_lr": constant(1e-4), "threshold": constant(1e-7)},
        scheduled=("latent_lr", "threshold"),
        numbers=unchanged("latent_lr", "threshold"),
        seed_=_seed_,
    )
)
