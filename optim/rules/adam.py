"""Adam for the full-precision parameters, with Keras' epsilon or torch's.

The arithmetic is that of `torch.optim.adam`, single-tensor, bit for bit on a CPU: unlike the fused
kernel its bits do not depend on how a parameter is cut into slices. It is written out here because
torch's takes the step and the learning rate from the host, which a CUDA graph cannot, and its
capturable form rounds differently. Keras adds epsilon to the uncorrected root ("epsilon hat" of the
Adam paper, section 2), torch to the corrected one; eps / sqrt(1 - beta2^t) in torch's place makes
them equal. Weight decay is the coupled kind (an L2 term in the loss).
"""

from typing import Any

from torch import Tensor

from bitfleet.optim.rules.rule import Group, Rule, State, register

KERAS_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-7, "weight_decay": 0.0}
"""tf.keras.optimizers.Adam, which trains everything that is not binary in all runs of the paper."""
TORCH_DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
"""torch.optim.Adam, of ReActNet's code."""


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
    """Apply one update in place, elementwise.

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
    numbers = adam_numbers({"lr": lr, "betas": betas, "eps": eps}, int(step))
    adam_(weight, grad, exp_avg, exp_avg_sq, betas=betas, weight_decay=weight_decay, **numbers)


def adam_numbers(group: Group, step: int) -> dict[str, float]:
    """Return what changes from step to step: the step size, the correction of the root, and epsilon
    as torch places it.

    Args:
        group: with lr, betas and eps.
        step: 1-based number of the update.
    """
    beta1, beta2 = group["betas"]
    root = (1.0 - beta2**step) ** 0.5
    return {"step_size": group["lr"] / (1.0 - beta1**step), "root": root, "corrected_eps": group["eps"] / root}


def torch_adam_numbers(group: Group, step: int) -> dict[str, float]:
    """Return `adam_numbers` with epsilon added to the corrected root, as torch does."""
    return {**adam_numbers(group, step), "corrected_eps": group["eps"]}


def adam_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    step_size: float | Tensor,
    root: float | Tensor,
    corrected_eps: float | Tensor,
) -> None:
    """Apply one update in place, elementwise, from the numbers of `adam_numbers`."""
    grad = grad.float()
    if weight_decay != 0:
        grad = grad.add(weight, alpha=weight_decay)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (exp_avg_sq.sqrt() / root).add_(corrected_eps)
    weight.sub_((exp_avg * step_size).div_(denominator))  # the bits of addcdiv_, whose factor cannot be a tensor


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    numbers = {key: group[key] for key in ("step_size", "root", "corrected_eps")}
    adam_(
        weight,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        betas=group["betas"],
        weight_decay=group["weight_decay"],
        **numbers,
    )


register(
    Rule(
        name="keras_adam",
        update_=_update_,
        state_keys=("exp_avg", "exp_avg_sq"),
        scheduled=("lr",),
        numbers=adam_numbers,
    )
)
register(
    Rule(
        name="adam",
        update_=_update_,
        state_keys=("exp_avg", "exp_avg_sq"),
        scheduled=("lr",),
        numbers=torch_adam_numbers,
    )
)
