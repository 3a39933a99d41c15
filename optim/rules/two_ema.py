"""Two cascaded moving averages of the gradient, and no threshold.

Paper: Quist, Li, van Gemert: "Understanding weight-magnitude hyperparameters in training binary
networks", ICLR 2023, arXiv 2303.02452: SGD with momentum and weight decay on latent weights is a
second-order filter of the gradient, whose seven hyperparameters come down to three. Reference code:
jorisquist/Understanding-WM-HP-in-BNNs. With u, h = 0 at the start, g the gradient with respect to
the +-1 weight w:

    u <- (1 - gamma) u + gamma g
    h <- (1 - alpha) h + alpha u
    w <- -w where w h > 0, else w          (a tie keeps; a real w becomes its sign)

The code lowers alpha to 0 over the run, linearly by epoch; a linear schedule here does so by step.
"""

import torch
from torch import Tensor

from bitfleet.optim.rules.bop2ndorder import seed_average_
from bitfleet.optim.rules.rule import Group, Rule, State, register, unchanged
from bitfleet.optim.schedules import constant, linear


@torch.no_grad()
def two_ema_step_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_cascaded: Tensor, *, gamma: float, alpha: float
) -> None:
    """Apply one update in place, elementwise.

    Args:
        weight: any shape, +-1.
        grad: gradient with respect to `weight`, same shape.
        exp_avg: average u of the gradient, fp32, same shape.
        exp_avg_cascaded: average h of u, fp32, same shape.
        gamma: rate of u, in (0, 1].
        alpha: rate of h, in [0, 1].
    """
    exp_avg.add_((grad.float() - exp_avg) * gamma)
    exp_avg_cascaded.add_((exp_avg - exp_avg_cascaded) * alpha)
    weight.copy_(torch.where(weight * exp_avg_cascaded > 0, -weight, weight).sign_())


def _seed_(weight: Tensor, mean_square: Tensor, state: State, group: Group, inertia: float) -> None:
    # Slow changes pass u as they are, so h has the noise of an average of the gradients themselves.
    seed_average_(state["exp_avg_cascaded"], weight, mean_square, rate=group["alpha"], inertia=inertia)


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    two_ema_step_(weight, grad, state["exp_avg"], state["exp_avg_cascaded"], gamma=group["gamma"], alpha=group["alpha"])


register(
    Rule(
        name="two_ema",
        update_=_update_,
        state_keys=("exp_avg", "exp_avg_cascaded"),
        flips=True,
        # The official code has no defaults. gamma is a momentum of 0.9; alpha falls to 0 as there,
        # from where is our choice.
        defaults={"gamma": constant(1e-1), "alpha": linear(1e-3, 0.0)},
        scheduled=("gamma", "alpha"),
        numbers=unchanged("gamma", "alpha"),
        seed_=_seed_,
    )
)
