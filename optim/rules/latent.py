"""Latent weights with the straight-through sign: what Bop and its relatives are compared with.

Papers: Courbariaux, Hubara, Soudry, El-Yaniv, Bengio: "Binarized Neural Networks", arXiv 1602.02830
(sign in the forward pass, the gradient passes straight through, weights are clipped); Helwegen et
al., arXiv 1906.02107, section 2. Recipes: larq-zoo. With w~ the latent weight, g the gradient with
respect to w = sign(w~), sign(0) = +1, t = 1, 2, ...:

    latent_adam:  m <- 0.9 m + 0.1 g,  v <- 0.999 v + 0.001 g^2
                  w~ <- clip(w~ - lr sqrt(1 - 0.999^t) / (1 - 0.9^t) m / (sqrt(v) + eps), -c, c)
    latent_sgd:   u <- momentum u + g
                  w~ <- clip(w~ - lr u, -1, 1)
    both:         w <- sign(w~)

The first is Keras' Adam, the second torch.optim.SGD. In the published code w~ is the parameter and
its sign part of the forward pass. Here w is the parameter and w~ is state of the rule, so that it
is sharded and the weights travel as bits. The numbers are the same: the gradient passes where |w~|
<= 1, and after clipping that is everywhere. latent_adam has two further forms: QuickNet's code
clips at c = 1.25, up to which its gradient passes. ReActNet's does not clip, and passes the
gradient where |w~| < 1 (latent_clip 0): a weight beyond that moves on with its momentum, stops, and
never returns.

At the start w~ = w u a, u uniform in (0, 1) by element, a = sqrt(6 / (fan_in + fan_out)): Glorot's
uniform sample, given its signs. A weight that is not +-1 then (model.initial_weights real) is
itself the latent one.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitfleet.optim.rules.adam import adam_step_
from bitfleet.optim.rules.rule import Group, Rule, State, register, unchanged
from bitfleet.optim.schedules import check_is_finite, constant


def glorot_limit(shape: torch.Size) -> float:
    """sqrt(6 / (fan_in + fan_out)) of a weight [out, in, ...]; of one with a single dimension, both
    are its length."""
    if len(shape) < 2:
        return math.sqrt(3.0 / max(shape.numel(), 1))
    return math.sqrt(6.0 / ((shape[0] + shape[1]) * shape[2:].numel()))


def begin_latent_(weight: Tensor, uniform: Tensor, shape: torch.Size, state: State, group: Group) -> None:
    """Fill state["latent"] with latent weights of the signs of `weight`; one that is not +-1 is its
    own.

    Args:
        weight: any shape.
        uniform: fp32, same shape, in (0, 1).
        shape: of the whole parameter.
        state: "latent" is fp32, of the shape of `weight`.
        group: not read.
    """
    drawn = torch.where(weight >= 0, uniform, -uniform) * glorot_limit(shape)
    state["latent"].copy_(torch.where(weight.abs() == 1.0, drawn, weight))


def clip_and_sign_(weight: Tensor, latent: Tensor, clip: float = 1.0) -> None:
    """Clip `latent` to [-clip, clip] (0: not) and set `weight` to its sign, sign(0) = sign(-0) =
    +1, in place."""
    if clip:
        latent.clamp_(-clip, clip)
    weight.copy_(torch.where(latent >= 0, 1.0, -1.0))


@torch.no_grad()
def latent_adam_step_(
    weight: Tensor,
    grad: Tensor,
    latent: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    latent_lr: float,
    step: Tensor,
    latent_clip: float = 1.0,
    latent_eps: float = 1e-7,
) -> None:
    """Apply one update in place, elementwise.

    Args:
        weight: any shape; only written, with +-1.
        grad: gradient with respect to the +-1 weight, same shape.
        latent: w~, fp32, same shape.
        exp_avg: first moment m, fp32, same shape.
        exp_avg_sq: second moment v, fp32, same shape.
        latent_lr: learning rate lr.
        step: 1-based number of this update, 0-dim, on the CPU.
        latent_clip: limit of |w~|. 0: no limit, and no gradient where |w~| >= 1.
        latent_eps: Keras' epsilon.
    """
    grad = grad.float() if latent_clip else torch.where(latent.abs() < 1.0, grad.float(), 0.0)
    adam_step_(latent, grad, exp_avg, exp_avg_sq, step=step, lr=latent_lr, eps=latent_eps)
    clip_and_sign_(weight, latent, latent_clip)


@torch.no_grad()
def latent_sgd_step_(
    weight: Tensor, grad: Tensor, latent: Tensor, momentum_buffer: Tensor, *, latent_lr: float, momentum: float
) -> None:
    """Apply one update in place, elementwise.

    Args:
        weight: any shape; only written, with +-1.
        grad: gradient with respect to the +-1 weight, same shape.
        latent: w~, fp32, same shape, in [-1, 1].
        momentum_buffer: u, fp32, same shape.
        latent_lr: learning rate lr.
        momentum: in [0, 1).
    """
    momentum_buffer.mul_(momentum).add_(grad.float())
    latent.sub_(
        momentum_buffer * latent_lr
    )  # not alpha=: a fused multiply-add would give other low bits in other kernels
    clip_and_sign_(weight, latent)


def walk(num_steps: int) -> float:
    """Return the level of a sum of gradients over a run, in units of one gradient: 10
    sqrt(num_steps).

    Uncorrelated ones give sqrt(num_steps). Those of a trained network are not, and a sum forgets
    none of them: ten times that keeps all signs in a short run (docs/optimizers.md has figures).
    """
    return 10.0 * math.sqrt(num_steps)


def _seed_adam_(weight: Tensor, mean_square: Tensor, state: State, group: Group, inertia: float) -> None:
    """Adam's steps have the size lr, independent of the size of the gradients."""
    _fill_latent_(state["latent"], weight * (inertia * group["latent_lr"] * walk(group["num_steps"])))


def _seed_sgd_(weight: Tensor, mean_square: Tensor, state: State, group: Group, inertia: float) -> None:
    """Each gradient comes to lr / (1 - momentum) of its size."""
    level = inertia * group["latent_lr"] / (1.0 - group["momentum"]) * walk(group["num_steps"])
    _fill_latent_(state["latent"], weight * mean_square.sqrt() * level)


def _fill_latent_(latent: Tensor, seeded: Tensor) -> None:
    """Keep latent weights that are there: the real weights of a file, which know more."""
    latent.copy_(torch.where(latent != 0, latent, seeded.clamp(-1.0, 1.0)))


def _update_adam_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    moments = state["latent"], state["exp_avg"], state["exp_avg_sq"]
    options = {key: group[key] for key in ("latent_lr", "latent_clip", "latent_eps") if key in group}
    latent_adam_step_(weight, grad, *moments, step=state["step"], **options)


def _update_sgd_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    moments = state["latent"], state["momentum_buffer"]
    latent_sgd_step_(weight, grad, *moments, latent_lr=group["latent_lr"], momentum=group["momentum"])


def _check_adam(hyperparameters: Mapping[str, Any]) -> None:
    for name in ("latent_clip", "latent_eps"):
        check_is_finite(f"optim.{name}", hyperparameters[name])


register(
    Rule(
        name="latent_adam",
        update_=_update_adam_,
        state_keys=("latent", "exp_avg", "exp_avg_sq"),
        flips=True,
        # Keras' Adam, from where larq-zoo's XNOR-Net starts (its Bi-Real Net: 5e-3).
        defaults={"latent_lr": constant(1e-3), "latent_clip": 1.0, "latent_eps": 1e-7},
        scheduled=("latent_lr",),
        driven=("latent_lr",),
        begin_=begin_latent_,
        seed_=_seed_adam_,
        check=_check_adam,
    )
)
register(
    Rule(
        name="latent_sgd",
        update_=_update_sgd_,
        state_keys=("latent", "momentum_buffer"),
        flips=True,
        # Where SGD starts in Lee et al. (arXiv 2404.19248), and the usual momentum.
        defaults={"latent_lr": constant(1e-1), "momentum": 0.9},
        scheduled=("latent_lr",),
        driven=("latent_lr",),
        numbers=unchanged("latent_lr"),
        begin_=begin_latent_,
        seed_=_seed_sgd_,
    )
)
