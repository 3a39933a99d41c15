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


@rule("keras_adam", "exp_avg", "exp_avg_sq")
def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    beta1, beta2 = group["betas"]
    adam(
        [weight],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        # torch's function counts the step itself.
        [state["step"] - 1],
        foreach=False,
        fused=False,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"] / (1.0 - beta2 ** int(state["step"])) ** 0.5,
        maximize=False,
    )
