"""BNEW: real weights in [-1, 1] that a concave regulariser drives to +-1, then their signs, frozen.

Paper: Paren and Poudel: "Training Binarized Neural Networks the Easy Way", BMVC 2022. Reference
code: Alasdair-P/bnew. With binary features all the time, w real and d Adam's direction (Keras'
epsilon, as adam.py):

    phase 1:  w <- clip(w - lr d, -1, 1)
    phase 2:  w <- clip((w - lr d) (1 + 2 rho), -1, 1)      down -rho |w|^2; rho: 0 to rho0
    phase 3:  w <- sign(w), sign(0) = +1, and stays         all other parameters keep training

The weights carry the mark of binary ones, but are values until phase 3: they are sharded, sent and
stored as values. Published runs on CIFAR-10: 1200 epochs, phase 2 from epoch 200 with rho0 = 1e-3
or 1e-4, phase 3 from epoch 1180, Adam from 1e-2 falling linearly. On ImageNet the paper gives each
filter the scale mean|w| besides its sign; here there is none, because the normalization after the
layer has one.

The layers start with signs. Before its first update a weight of +-1 becomes w u a, u uniform in (0,
1) by element, a = sqrt(6 / (fan_in + fan_out)): Glorot's uniform sample, given its signs. So only
the gradient of the first step is that of the signs; a weight that starts with another value, as
from a file, keeps it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitfleet.optim.rules.adam import adam_step_
from bitfleet.optim.rules.latent import glorot_limit
from bitfleet.optim.rules.rule import Group, Rule, State, register
from bitfleet.optim.schedules import Schedule, linear


@torch.no_grad()
def bnew_step_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, latent_lr: float, rho: float, step: Tensor
) -> None:
    """Apply one update of phase 1 (rho = 0) or 2 in place, elementwise.

    Args:
        weight: w, any shape, in [-1, 1].
        grad: gradient with respect to `weight`, same shape.
        exp_avg: Adam's first moment, fp32, same shape.
        exp_avg_sq: Adam's second moment, fp32, same shape.
        latent_lr: learning rate lr.
        rho: factor of the regulariser, not negative.
        step: 1-based number of this update, 0-dim, on the CPU.
    """
    adam_step_(weight, grad, exp_avg, exp_avg_sq, step=step, lr=latent_lr)
    weight.mul_(1.0 + 2.0 * rho).clamp_(-1.0, 1.0)


def begin_real_(weight: Tensor, uniform: Tensor, shape: torch.Size, state: State, group: Group) -> None:
    """Turn the weights that are +-1 into real ones of the same sign, in place.

    Args:
        weight: any shape.
        uniform: fp32, same shape, in (0, 1).
        shape: of the whole parameter.
        state: not read.
        group: not read.
    """
    weight.copy_(torch.where(weight.abs() == 1.0, weight * uniform * glorot_limit(shape), weight))


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    if not group["free"]:
        weight.copy_(torch.where(weight >= 0, 1.0, -1.0))
        return
    moments = state["exp_avg"], state["exp_avg_sq"]
    bnew_step_(weight, grad, *moments, latent_lr=group["latent_lr"], rho=group["rho"], step=state["step"])


def check_phases(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless rho, rho_from and frozen_from make phases: parts of the run in order,
    rho0 in [0, 1]."""
    rho, rho_from, frozen_from = (values[name] for name in ("rho", "rho_from", "frozen_from"))
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"optim.rho must be in [0, 1], not {rho}")
    if not 0.0 <= rho_from < frozen_from < 1.0:
        raise ValueError(
            f"optim.rho_from is {rho_from} and optim.frozen_from {frozen_from}: these are parts of the run, expected "
            f"0 <= rho_from < frozen_from < 1"
        )


def phase_schedules(values: Mapping[str, Any], num_steps: int) -> dict[str, Schedule]:
    """Return the schedules that make the phases: "rho", and "free", which is 1 until phase 3 and
    then 0.

    Args:
        values: rho, rho_from and frozen_from, as `check_phases` has them.
        num_steps: of the run; phase 3 starts after step 0 in any case.
    """
    begin = int(values["rho_from"] * num_steps)
    frozen = max(1, int(values["frozen_from"] * num_steps))
    return {
        "rho": Schedule(
            start=0.0, end=values["rho"], kind="polynomial", num_steps=num_steps - begin, delay_steps=begin
        ),
        "free": Schedule(start=1.0, kind="exponential", rate=0.0, num_steps=frozen),
    }


register(
    Rule(
        name="bnew",
        update_=_update_,
        state_keys=("exp_avg", "exp_avg_sq"),
        # The official runs on CIFAR-10, which freeze after 0.983; earlier here, so that a short run
        # has steps left then.
        defaults={"latent_lr": linear(1e-2, 0.0), "rho": 1e-3, "rho_from": 1 / 6, "frozen_from": 0.95},
        scheduled=("latent_lr", "rho"),
        begin_=begin_real_,
        schedules=phase_schedules,
        check=check_phases,
    )
)
