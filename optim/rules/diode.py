"""Diode: two moving averages, the second one of the sign of the first; neither a threshold nor the
scale of the gradient.

Reference code: GreenBitAI/bitorch-engine, "diode v1" (ECCV 2024). With e1 = 0 and e2 = -w U(0,
1e-3) at the start, g the gradient with respect to the +-1 weight w:

    e1 <- beta1 e1 + (1 - beta1) g                       gamma = 1 - beta1 = 0.01
    e2 <- beta2 e2 + (1 - beta2) lr sgn(e1)              alpha = 1 - beta2 = 0.0001
    w  <- -sgn(e2), +1 where e2 = 0

lr only matters against the first values of e2: later its scale cancels in the sign.
"""

import math

import torch
from torch import Tensor

from bitfleet.optim.rules.rule import Group, Rule, State, register, unchanged
from bitfleet.optim.schedules import constant

FIRST_LIMIT = 1e-3
"""Largest |e2| at the start."""


@torch.no_grad()
def diode_step_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sign: Tensor,
    *,
    gamma: float,
    alpha: float,
    latent_lr: float,
) -> None:
    """Apply one update in place, elementwise.

    Args:
        weight: any shape; only written, with +-1.
        grad: gradient with respect to the +-1 weight, same shape.
        exp_avg: e1, fp32, same shape.
        exp_avg_sign: e2, fp32, same shape.
        gamma: rate of e1, in (0, 1].
        alpha: rate of e2, in (0, 1].
        latent_lr: lr, the scale of what e2 averages.
    """
    exp_avg.add_((grad.float() - exp_avg) * gamma)
    exp_avg_sign.add_((exp_avg.sign() * latent_lr - exp_avg_sign) * alpha)
    weight.copy_(torch.where(exp_avg_sign > 0, -1.0, 1.0))


def _begin_(weight: Tensor, uniform: Tensor, shape: torch.Size, state: State, group: Group) -> None:
    state["exp_avg_sign"].copy_(torch.where(weight >= 0, -uniform, uniform) * FIRST_LIMIT)


def _seed_(weight: Tensor, mean_square: Tensor, state: State, group: Group, inertia: float) -> None:
    """e2 averages signs of e1, which keep for about 1 / gamma steps: noise gives it lr sqrt(alpha /
    gamma)."""
    gamma, alpha = group["gamma"], group["alpha"]
    level = group["latent_lr"] * (math.sqrt(alpha / gamma) if alpha < gamma else 1.0)
    state["exp_avg_sign"].copy_(weight * (-inertia * level))


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    diode_step_(
        weight,
        grad,
        state["exp_avg"],
        state["exp_avg_sign"],
        gamma=group["gamma"],
        alpha=group["alpha"],
        latent_lr=group["latent_lr"],
    )


register(
    Rule(
        name="diode",
        update_=_update_,
        state_keys=("exp_avg", "exp_avg_sign"),
        flips=True,
        # bitorch-engine's rates; the learning rate is our choice, as large as the state at the
        # start.
        defaults={"gamma": constant(1e-2), "alpha": constant(1e-4), "latent_lr": constant(1e-3)},
        scheduled=("gamma", "alpha", "latent_lr"),
        numbers=unchanged("gamma", "alpha", "latent_lr"),
        begin_=_begin_,
        seed_=_seed_,
    )
)
