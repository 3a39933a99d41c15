"""Advice on the rules that move a value whose sign is the weight: latent_adam, latent_sgd, sgdat and bnew."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bitfleet.launch.advise.memory import values_of
from bitfleet.launch.advise.outlook import Line, Outlook, Verdict
from bitfleet.models import create_model
from bitfleet.optim import Schedule, is_binary
from bitfleet.optim.rules.bnew import phase_schedules
from bitfleet.optim.rules.latent import glorot_limit
from bitfleet.trainer.config import TrainConfig


class Sizes(NamedTuple):
    """Mean size of the first latent weights, half of Glorot's limit."""

    mean: float
    """Over all weights."""
    smallest: float
    """Of the layer with the smallest."""
    largest: float
    """Of the layer with the largest."""


def first_sizes(config: TrainConfig) -> Sizes | None:
    """Of the network of `config`; None without binary weights."""
    with torch.device("meta"):
        params = [param for param in create_model(config.model).parameters() if is_binary(param)]
    if not params:
        return None
    sizes = [glorot_limit(param.shape) / 2.0 for param in params]
    total = sum(size * param.numel() for size, param in zip(sizes, params, strict=True))
    return Sizes(total / sum(param.numel() for param in params), min(sizes), max(sizes))


def latent_adam_lines(outlook: Outlook) -> list[Line]:
    """Adam moves by about the learning rate, whatever the gradient."""
    return [*_crossing_lines(outlook, 1.0, outlook.num_steps), *_end_lines(outlook)]


def latent_sgd_lines(outlook: Outlook) -> list[Line]:
    """SGD moves by the learning rate times the gradient, summed up by the momentum."""
    momentum, gradient = outlook.config.optim.momentum, outlook.gradient
    assert momentum is not None
    end = _end_lines(outlook)
    if gradient is None:
        why = "latent_lr has the scale of the gradient, which was not measured"
        return [Line("steps to the other sign", "unknown", "look", why), *end]
    return [*_crossing_lines(outlook, gradient.rms / (1.0 - momentum), outlook.num_steps), *end]


def bnew_lines(outlook: Outlook) -> list[Line]:
    """Its three phases: Adam, the growth by rho, and what is left when the weights are frozen."""
    optim = outlook.config.optim
    assert optim.frozen_from is not None
    phases = phase_schedules(optim.hyperparameters, outlook.decay_steps)
    last = outlook.num_steps
    frozen = phases["free"].num_steps
    assert frozen is not None
    free = min(frozen, last)
    lines = [*_crossing_lines(outlook, 1.0, free), _growth_line(outlook, phases["rho"], free)]
    title, value, left = "weights are frozen", f"from step {frozen + 1:,}", last - frozen
    if left <= 0:
        why = f"the run has {last:,} steps: it ends with weights that are not +-1; lower optim.frozen_from"
        return [*lines, Line(title, value, "wrong", why)]
    why = f"BatchNorm and all that is not binary have the {left:,} steps that are left to fit the signs"
    verdict: Verdict = "ok" if left >= outlook.steps_per_epoch else "look"
    return [*lines, Line(title, value, verdict, why if verdict == "ok" else f"{why}, less than an epoch")]


def sgdat_lines(outlook: Outlook) -> list[Line]:
    """The growth of a weight's threshold, against that of its accumulator."""
    gradient, last = outlook.gradient, outlook.num_steps
    end = _end_lines(outlook)
    title, threshold = "growth of the threshold", outlook.schedule("threshold")(last - 1)
    if gradient is None or gradient.rms == 0.0:
        why = f"each flip adds {threshold:g}; latent_lr has the scale of the gradient, which was not measured"
        return [Line(title, "unknown", "look", why), *end]
    rates, stride = values_of(outlook.schedule("latent_lr"), last)
    accumulator = gradient.rms * math.sqrt(float(np.square(rates).sum()) * stride)
    # Without a threshold a random walk changes its sign 2 sqrt(steps) / pi times.
    flips = 2.0 * math.sqrt(last) / math.pi
    value = f"{threshold:.1e} a flip, M {accumulator:.1e}"
    share = flips * threshold / accumulator if accumulator > 0.0 else math.inf
    noise = f"on noise M is {accumulator:.1e} (rms) at the end, and without a threshold would have flipped {flips:.2g} times"
    if threshold > 4.0 * accumulator:
        why = f"{noise}: a weight that has flipped once does not flip again; lower the threshold or raise latent_lr"
        return [Line(title, value, "wrong", why), *end]
    if share < 0.01:
        why = f"{noise}: that many flips raise the threshold to {share:.1g} of M, so it hardly matters"
        return [Line(title, value, "look", why), *end]
    return [Line(title, value, "ok", f"{noise}: that many flips would raise the threshold to {share:.2g} of M"), *end]


def _crossing_lines(outlook: Outlook, scale: float, num_steps: int) -> list[Line]:
    """After how many steps a latent weight can have the other sign, where a step moves it by `scale` times latent_lr."""
    sizes = first_sizes(outlook.config)
    if sizes is None:
        return []
    rates, stride = values_of(outlook.schedule("latent_lr"), num_steps)
    agreeing, noise = np.cumsum(rates) * stride * scale, np.sqrt(np.cumsum(np.square(rates)) * stride) * scale
    title = "steps to the other sign"
    step = scale * rates[0]
    origin = (
        f"latent weights begin at {sizes.mean:.2g} (mean size; layers from {sizes.smallest:.2g} to {sizes.largest:.2g}), a step "
        f"moves them by {step:.1e} at the start"
    )
    value = f"{_count(agreeing, sizes.mean, stride)} agreeing, {_count(noise, sizes.mean, stride)} of noise"
    if agreeing[-1] < sizes.smallest:
        why = f"{origin}: all {num_steps:,} together move them by {agreeing[-1]:.1e}, so few can flip; raise latent_lr"
        return [Line(title, value, "wrong", why)]
    if noise[-1] < sizes.mean:
        why = f"{origin}: only weights whose gradients agree, or that begin near 0, flip within the {num_steps:,}"
        return [Line(title, value, "look", why)]
    if step > sizes.mean:
        return [
            Line(title, value, "look", f"{origin}: the first step can turn most of them; lower latent_lr or warm it up")
        ]
    return [Line(title, value, "ok", f"{origin}; both are within the {num_steps:,}")]


def _count(moved: npt.NDArray[np.float64], size: float, stride: int) -> str:
    found = np.flatnonzero(moved >= size)
    return f"{found[0] * stride + 1:,}" if len(found) else "never"


def _end_lines(outlook: Outlook) -> list[Line]:
    """Whether the learning rate lets the weights come to rest; nothing where a controller sees to it."""
    if outlook.driven == "latent_lr":
        return []
    schedule = outlook.schedule("latent_lr")
    end, largest = schedule(outlook.num_steps - 1), float(values_of(schedule, outlook.num_steps)[0].max())
    share = end / largest if largest > 0.0 else 0.0
    title, value = "latent_lr at the end", f"{end:.3g}"
    if share > 0.1:
        return [
            Line(title, value, "look", f"{share:.0%} of its largest: weights near 0 flip until the end; let it fall")
        ]
    return [Line(title, value, "ok", f"{share:.1g} of its largest: the weights come to rest")]


def _growth_line(outlook: Outlook, rho: Schedule, num_steps: int) -> Line:
    """What bnew's regulariser multiplies a weight by until it is frozen."""
    values, stride = values_of(rho, num_steps)
    logs = np.cumsum(np.log1p(2.0 * values)) * stride
    title, value = "growth by rho", f"x {math.exp(min(float(logs[-1]), 700.0)):.2g}"
    sizes = first_sizes(outlook.config)
    if sizes is None:
        return Line(title, value, "ok", "there are no binary weights")
    found = np.flatnonzero(logs >= -math.log(sizes.mean))
    begin = f"(1 + 2 rho)^steps from step {rho.delay_steps + 1:,} to {num_steps:,}"
    if len(found):
        why = f"{begin}: a weight of the first size, {sizes.mean:.2g}, is at +-1 from step {found[0] * stride + 1:,} by it alone"
        return Line(title, value, "ok", why)
    why = (
        f"{begin}: a weight of the first size, {sizes.mean:.2g}, is not at +-1 by it when its sign is taken; raise rho"
    )
    return Line(title, value, "look", why)
