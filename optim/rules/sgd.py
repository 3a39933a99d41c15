"""SGD with momentum for the full-precision parameters, as Keras' writes it.

    g <- g + weight_decay w
    v <- momentum v - lr g
    w <- w + v

The learning rate is inside of the velocity v: after it has changed, Keras' earlier steps still
carry the old one. torch.optim.SGD multiplies the sum by the present one. Both are equal while the
learning rate is constant.
"""

from typing import Any

import torch
from torch import Tensor

from bitfleet.optim.rules.rule import Group, Rule, State, register, unchanged

KERAS_DEFAULTS: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0}
"""As the runs of QuickNet; Keras' own momentum is 0."""


@torch.no_grad()
def keras_sgd_step_(
    weight: Tensor,
    grad: Tensor,
    velocity: Tensor,
    *,
    lr: float | Tensor,
    momentum: float = KERAS_DEFAULTS["momentum"],
    weight_decay: float = 0.0,
) -> None:
    """Apply one update in place, elementwise.

    Args:
        weight: any shape, fp32 or bf16.
        grad: gradient with respect to `weight`, same shape.
        velocity: v, fp32, same shape.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: L2 factor.
    """
    grad = grad.float()
    if weight_decay != 0:
        grad = grad.add(weight, alpha=weight_decay)
    velocity.mul_(momentum).sub_(grad * lr)  # not alpha=: a fused multiply-add would give other low bits
    weight.add_(velocity)


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    options = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
    keras_sgd_step_(weight, grad, state["velocity"], **options)


register(
    Rule(
        name="keras_sgd",
        update_=_update_,
        state_keys=("velocity",),
        scheduled=("lr",),
        numbers=unchanged("lr"),
    )
)
