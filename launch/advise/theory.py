"""Predict what flip rules do to noise: gradients that are independent normal numbers.

Before a run only the size of its gradients is known, and during most of it they are mostly noise.
What the rules do to noise needs no network:

    noise floor   standard deviation of r once m and v have settled: sqrt(gamma / (2 - gamma))
    threshold 0   w = -sign(m), which flips when m crosses 0: arctan(gamma / ((1 - gamma) s)) / pi
                  of the weights per step, s the standard deviation of m / g before it
    threshold h   r is an Ornstein-Uhlenbeck process, and w flips when r crosses the band from -h to
                  h. That leaves sqrt(pi / 2) a / (2 R D(h / R) + 1.166 a) of the flips above: R and
                  a the standard deviations of r and of its step, D(x) the integral of exp(t^2 / 2)
                  from 0 to x (first-passage time), the last term the overshoot of a walk of normal
                  steps (Siegmund 1985, 0.583 a on each side)

The first steps, in which r is neither normal nor slow, are simulated.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import erfi

from bitfleet.optim.kernels.kernels import EPS, Correction, bias_corrections
from bitfleet.optim.schedules import Schedule

Array = npt.NDArray[np.floating[Any]]

FIRST_STEPS = 110  # simulated; the window around step 100 ends with them
NUM_WEIGHTS = 20_000
NO_FLIPS = 1e-12  # less than one flip per run in any network counts as 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlipRule:
    """A bit-flipping rule with its schedules, every length filled in."""

    gamma: Schedule
    threshold: Schedule
    sigma: Schedule | None = None
    """None: no second moment, r = m (Bop)."""
    correction: Correction = "none"

    def ratio(self, exp_avg: Array, exp_avg_sq: Array, step: int) -> Array:
        """Return r, which the rule compares with the threshold at the 1-based `step`."""
        if self.sigma is None:
            return exp_avg
        divisor, divisor_sq = bias_corrections(self.correction, self.gamma(step - 1), self.sigma(step - 1), step)
        ratio: Array = exp_avg / divisor / (np.sqrt(exp_avg_sq / divisor_sq) + EPS)
        return ratio


class Snapshot(NamedTuple):
    """Prediction for one 1-based step."""

    step: int
    gamma: float
    sigma: float  # nan without a second moment
    threshold: float
    free_flip_ratio: float  # fraction of the weights that would flip at threshold 0
    ratio_rms: float  # root mean square of r
    exp_avg_rms: float  # root mean square of m / g
    second_moment: float  # mean of v / g^2
    flip_ratio: float  # fraction of the weights that flip
    dead_band: float  # fraction of the weights with |r| <= threshold

    @property
    def move(self) -> float:
        """Standard deviation of the change of r in one step."""
        return self.gamma * self.ratio_rms / (self.exp_avg_rms or 1.0)  # m may still be 0


def window(step: int, num_steps: int) -> range:
    """Return the steps over which a flip ratio is averaged: a tenth to both sides, at most 100."""
    half = min(100, step // 10)
    return range(step - half, min(step + half, num_steps) + 1)


def band_share(move: float, threshold: float, ratio_rms: float) -> float:
    """Return the share of the flips at threshold 0 that is left; `move` is a step of r."""
    if ratio_rms == 0.0:
        return float(threshold == 0.0)
    width = min(threshold / ratio_rms / 2**0.5, 20.0)  # erfi(20) is 1e172
    crossing = ratio_rms * math.sqrt(2.0 * math.pi) * float(erfi(width)) + 1.166 * move
    return min(1.0, math.sqrt(math.pi / 2.0) * move / (crossing or 1.0))


def predict(rule: FlipRule, num_steps: int, steps: Iterable[int], *, gradient: float = 1.0) -> dict[int, Snapshot]:
    """Return 1-based step -> prediction, in ascending order, for the `steps` within the run.

    `gradient` is the standard deviation of the gradients; it matters to Bop, and next to epsilon.
    """
    wanted, snapshots = {step for step in steps if step <= num_steps}, {}
    simulated = simulate(rule, min(FIRST_STEPS, num_steps), gradient)
    variance, second_moment, sigma = 0.0, 0.0, math.nan
    for step in range(1, max(wanted, default=0) + 1):
        gamma, variance_before = rule.gamma(step - 1), variance
        variance = (1.0 - gamma) ** 2 * variance + gamma**2
        if rule.sigma is not None:
            sigma = rule.sigma(step - 1)
            second_moment += sigma * (1.0 - second_moment)
        if step not in wanted:
            continue
        exp_avg, exp_avg_sq = np.array([math.sqrt(variance) * gradient]), np.array([second_moment * gradient**2])
        rms, threshold = float(rule.ratio(exp_avg, exp_avg_sq, step)[0]), rule.threshold(step - 1)
        free = math.atan2(gamma, (1.0 - gamma) * math.sqrt(variance_before)) / math.pi
        band = math.erf(threshold / rms / 2**0.5) if rms else 1.0
        snapshot = Snapshot(step, gamma, sigma, threshold, free, rms, math.sqrt(variance), second_moment, 0.0, band)
        flips, around = free * band_share(snapshot.move, threshold, rms), window(step, num_steps)
        if around[-1] <= len(simulated):
            flips, band = math.fsum(simulated[at - 1][0] for at in around) / len(around), simulated[step - 1][1]
        snapshots[step] = snapshot._replace(flip_ratio=flips if flips > NO_FLIPS else 0.0, dead_band=band)
    return snapshots


def simulate(rule: FlipRule, num_steps: int, gradient: float = 1.0) -> list[tuple[float, float]]:
    """Run the rule on NUM_WEIGHTS weights; return flip ratio and dead band per step."""
    random = np.random.default_rng(0)
    weight = np.where(random.random(NUM_WEIGHTS) < 0.5, np.float32(1), np.float32(-1))
    exp_avg, exp_avg_sq = np.zeros(NUM_WEIGHTS, np.float32), np.zeros(NUM_WEIGHTS, np.float32)
    counts = []
    for step in range(num_steps):
        grad = random.standard_normal(NUM_WEIGHTS, np.float32) * np.float32(gradient)
        exp_avg += (grad - exp_avg) * np.float32(rule.gamma(step))
        if rule.sigma is not None:
            exp_avg_sq += (grad * grad - exp_avg_sq) * np.float32(rule.sigma(step))
        ratio, threshold = rule.ratio(exp_avg, exp_avg_sq, step + 1), np.float32(rule.threshold(step))
        flips = weight * ratio > threshold
        np.negative(weight, out=weight, where=flips)
        counts.append((float(flips.mean()), float((np.abs(ratio) <= threshold).mean())))
    return counts


def settled_step(sigma: Schedule, num_steps: int) -> int | None:
    """Return the step at which the sum of sigma reaches 1: v has forgotten its start at 0."""
    sums = itertools.accumulate(sigma(step) for step in range(num_steps))
    return next((step for step, total in enumerate(sums, 1) if total >= 1.0), None)


def outlived_step(rate: Schedule, num_steps: int) -> int | None:
    """Return the step from which 1/rate is more than the steps that are left; None: the last."""
    return next((step for step in range(1, num_steps) if rate(step - 1) * (num_steps - step) < 1.0), None)
