"""Adam for the full-precision parameters, with Keras' epsilon.

The arithmetic is `torch.optim.adam`, single-tensor: unlike the fused kernel its bits do not depend on how a parameter is cut
into slices. Keras adds epsilon to the uncorrected root ("epsilon hat" of the Adam paper, section 2), torch to the corrected
one; eps / sqrt(1 - beta2^t) in torch's place makes them equal. Weight decay is the coupled kind (an L2 term in the loss).
"""

from typing import Any

from torch import Tensor
from torch.optim.adam import adam

from bitfleet.optim.routed import Group, State, rule

KERAS_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-7, "weight_decay": 0.0}
"""tf.keras.optimizers.Adam, which trains everything that is not binary in all runs of the paper."""


def adam_step_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: Tensor,
    lr: float,
    betas: tuple[float, float] = KERAS_DEFAULTS["betas"],
    eps: float = KERAS_DEFAULTS["eps"],
    weight_decay: float = 0.0,
) -> None:
    """One update in place, elementwise.

    Args:
        weight: any shape, fp32 or bf16.
        grad: gradient with respect to `weight`, same shape.
        exp_avg: first moment, fp32, same shape.
        exp_avg_sq: second moment, fp32, same shape.
        step: 1-based number of this update, 0-dim, on the CPU.
        lr: learning rate.
        betas: decay of the two moments.
        eps: Keras' epsilon.
        weight_decay: L2 factor.
    """
    adam(
        [weight],
        [grad.float()],
        [exp_avg],
        [exp_avg_sq],
        [],
        # torch's function counts the step itself.
        [step - 1],
        foreach=False,
        fused=False,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps / (1.0 - betas[1] ** int(step)) ** 0.5,
        maximize=False,
    )


@rule("keras_adam", "exp_avg", "exp_avg_sq")
def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    adam_step_(
        weight,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        step=state["step"],
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )
