"""Real weights in the place of binary ones, by Adam: the first stage of two-stage recipes.

Only the features are binary then; a second run starts from the weights (--init) and makes them +-1.
ReActNet (arXiv 2003.03488), Real-to-Binary (arXiv 2003.11535). As torch.optim.Adam:

    g <- g + latent_decay w
    w <- w - latent_lr Adam(g)

Weights start as real values with model.initial_weights "real".
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bitfleet.optim.rules.adam import TORCH_DEFAULTS, adam_, torch_adam_numbers
from bitfleet.optim.rules.rule import Group, Rule, State, register
from bitfleet.optim.schedules import check_is_finite, constant


def _numbers(group: Group, step: int) -> dict[str, float]:
    return torch_adam_numbers({**TORCH_DEFAULTS, "lr": group["latent_lr"]}, step)


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    numbers = {key: group[key] for key in ("step_size", "root", "corrected_eps")}
    moments, betas = (state["exp_avg"], state["exp_avg_sq"]), TORCH_DEFAULTS["betas"]
    adam_(weight, grad, *moments, betas=betas, weight_decay=group["latent_decay"], **numbers)


def _check(hyperparameters: Mapping[str, Any]) -> None:
    check_is_finite("optim.latent_decay", hyperparameters["latent_decay"])


register(
    Rule(
        name="real_adam",
        update_=_update_,
        state_keys=("exp_avg", "exp_avg_sq"),
        # Where Adam starts in Real-to-Binary.
        defaults={"latent_lr": constant(1e-3), "latent_decay": 0.0},
        scheduled=("latent_lr",),
        numbers=_numbers,
        check=_check,
    )
)
