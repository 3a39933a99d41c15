"""What flip rules do to noise: closed forms, and a simulation of the rule on gradients that are independent normal numbers.

Before a run nothing is known of its gradients but their size, and during most of it they are mostly noise: the gradient of a
weight changes its sign from step to step. What the rules do to such noise needs no network:

    first step      m = gamma g, v = sigma g^2, so |r| = gamma / sqrt(sigma) for every weight (bop2ndorder, "none")
    noise floor     the standard deviation of r once m and v have settled: sqrt(gamma / (2 - gamma))
    threshold 0     w = -sign(m), so a weight flips when m crosses 0: arctan(gamma / ((1 - gamma) s)) / pi of all weights,
                    s the standard deviation of m / g before the step (the arc of two normal numbers of a known correlation)

A threshold that matters has no such form: `simulate` runs a few thousand weights.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitfleet.optim.kernels.kernels import EPS, Correction, bias_corrections
from bitfleet.optim.schedules import Schedule

Array = npt.NDArray[np.float32]

NUM_WEIGHTS = 2048
FINE_STEPS = 600
"""So many steps are simulated one by one at the start, and before each later snapshot."""
NUM_STRIDES = 4000
"""The steps between are taken in about so many strides."""
FEW_FLIPS = 300
"""Fewer say too little: with a narrow band the closed form is taken instead."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FlipRule:
    """A bit-flipping rule with its schedules, every length filled in."""

    gamma: Schedule
    threshold: Schedule
    sigma: Schedule | None = None
    """None: there is no second moment, r = m (Bop)."""
    correction: Correction = "none"

    def ratio(self, exp_avg: Array, exp_avg_sq: Array, step: int) -> Array:
        """What is compared with the threshold at the 1-based `step`."""
        if self.sigma is None:
            return exp_avg
        divisor, divisor_sq = bias_corrections(self.correction, self.gamma(step - 1), self.sigma(step - 1), step)
        root = np.sqrt(exp_avg_sq if divisor_sq == 1.0 else exp_avg_sq / divisor_sq)
        root += EPS
        result: Array = np.divide(exp_avg if divisor == 1.0 else exp_avg / divisor, root)
        return result


class Snapshot(NamedTuple):
    """The simulated weights around one step."""

    step: int
    """1-based."""
    gamma: float
    sigma: float
    """nan without a second moment."""
    threshold: float
    flip_ratio: float
    """Fraction of the weights that flip, about the mean over `window(step, ...)`."""
    free_flip_ratio: float
    """The same at threshold 0, in closed form."""
    dead_band: float
    """Fraction with |r| <= threshold."""
    ratio_rms: float
    """Root of the mean of r^2."""
    exp_avg_rms: float
    """Of m, in units of the gradient's standard deviation."""
    second_moment: float
    """Mean of v, in units of the gradient's variance."""

    @property
    def move(self) -> float:
        """How far one step moves r, as a standard deviation."""
        return self.gamma * self.ratio_rms / (self.exp_avg_rms or 1.0)  # 0 as long as gamma was


def window(step: int, num_steps: int) -> range:
    """The steps over which a flip ratio at `step` is averaged: a tenth of it to both sides, at most 100."""
    half = min(100, step // 10)
    return range(step - half, min(step + half, num_steps) + 1)


def noise_floor(gamma: float) -> float:
    """Standard deviation of r on independent gradients, both moments settled: about sqrt(gamma / 2)."""
    return math.sqrt(gamma / (2.0 - gamma))


def first_ratio(rule: FlipRule, gradient: float) -> float:
    """|r| of a weight at step 1, the same for all but for epsilon; `gradient` is the size of its gradient."""
    exp_avg, exp_avg_sq = np.float32(rule.gamma(0) * gradient), np.float32(0.0)
    if rule.sigma is not None:
        exp_avg_sq = np.float32(rule.sigma(0) * gradient * gradient)
    return float(rule.ratio(np.atleast_1d(exp_avg), np.atleast_1d(exp_avg_sq), 1)[0])


def first_flip_ratio(rule: FlipRule, gradient: float) -> float:
    """Fraction of the weights that flip at step 1 on normal gradients of standard deviation `gradient`.

    Half of the weights have the sign of their gradient. With a second moment all of these flip or none; without one (Bop) those
    whose gradient is large enough.
    """
    if rule.sigma is not None:
        return 0.5 if first_ratio(rule, gradient) > rule.threshold(0) else 0.0
    return 0.5 * math.erfc(rule.threshold(0) / max(rule.gamma(0) * gradient, 1e-300) / math.sqrt(2.0))


def free_flip_ratio(gamma: float, variance: float) -> float:
    """Fraction of the weights that flip in a step at threshold 0, on independent normal gradients.

    Args:
        gamma: of the step.
        variance: of m before the step, in units of the gradient's.
    """
    return math.atan2(gamma, (1.0 - gamma) * math.sqrt(variance)) / math.pi


def narrow_band_share(move: float, threshold: float) -> float:
    """Of the flips at threshold 0 those that are left with `threshold`, if that is far below the spread of r.

    Near 0, r is a random walk. It crosses 0 once in sqrt(pi / 2) / (p move) steps, p the density of r there, and the band of
    2 threshold once in (2 threshold + 1.17 move) / (p move^2), the second term being what a walk of normal steps overshoots by
    (Siegmund 1985, 0.583 of a step on each side).

    Args:
        move: standard deviation of a step of r.
        threshold: half the width of the band.
    """
    return min(1.0, math.sqrt(math.pi / 2.0) * move / (2.0 * threshold + 1.166 * move or 1.0))


def settled_step(sigma: Schedule, num_steps: int) -> int | None:
    """The 1-based step from which v has forgotten that it began at 0: the sum of sigma has reached 1. None: not in the run."""
    return first_step(np.cumsum, sigma, num_steps, lambda total, _: total >= 1.0)


def outlived_step(rate: Schedule, num_steps: int) -> int | None:
    """The 1-based step from which a memory of 1/rate is longer than what is left of the run. None: only its last step."""
    return first_step(lambda each: each, rate, num_steps - 1, lambda each, steps: each * (num_steps - steps) < 1.0)


def first_step(
    total: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    schedule: Schedule,
    num_steps: int,
    holds: Callable[[npt.NDArray[np.float64], npt.NDArray[np.int64]], npt.NDArray[np.bool_]],
) -> int | None:
    """The first 1-based step at which `holds(total(values), steps)`, on a grid of at most 20,000 points."""
    stride = max(1, num_steps // 20_000)
    steps = np.arange(1, num_steps + 1, stride)
    values = total(np.array([schedule(int(step) - 1) for step in steps]) * (stride if total is np.cumsum else 1))
    found = np.flatnonzero(holds(values, steps))
    return int(steps[found[0]]) if len(found) else None


def simulate(rule: FlipRule, num_steps: int, steps: Sequence[int], *, gradient: float = 1.0) -> list[Snapshot]:
    """Run the rule on NUM_WEIGHTS weights whose gradients are independent normal numbers, and look at them around `steps`.

    The first FINE_STEPS steps, and as many before each later snapshot, are made one by one. In between m makes strides, which
    are exact for it; v gets the mean and the variance that it would have, as a normal number; the signs are looked at once a
    stride. Beside each weight runs one with threshold 0 on the same gradients: the quotient of their flips, times the closed
    form, is far less noisy than a count. The seed is fixed: the same input gives the same numbers.

    Args:
        rule: what is simulated.
        num_steps: steps of the run.
        steps: 1-based, within the run.
        gradient: standard deviation of the gradients; it matters to Bop, and beside epsilon.

    Returns:
        A snapshot for each of `steps`, in ascending order.
    """
    wanted = sorted(set(steps))
    assert wanted[0] >= 1, wanted
    assert wanted[-1] <= num_steps, wanted
    weights = _Weights(rule, gradient)
    counted: dict[int, list[tuple[int, int]]] = {step: [] for step in wanted}
    found: dict[int, Snapshot] = {}
    done = 0
    for first, last in _fine_stretches(wanted, num_steps):
        stride = max(2, num_steps // NUM_STRIDES)
        while done < first - 1:
            length = min(stride, first - 1 - done)
            weights.stride(done, length)
            done += length
        for step in range(done + 1, last + 1):
            flips = weights.step(step)
            for at in wanted:
                if step in window(at, num_steps):
                    counted[at].append(flips)
            if step in counted:
                found[step] = weights.look(step)
        done = last
    return [_with_flips(found[step], counted[step]) for step in wanted]


def _with_flips(snapshot: Snapshot, counted: Sequence[tuple[int, int]]) -> Snapshot:
    flips, free_flips = (sum(column) for column in zip(*counted, strict=True))
    if free_flips < FEW_FLIPS and snapshot.threshold < 0.1 * snapshot.ratio_rms:
        share = narrow_band_share(snapshot.move, snapshot.threshold)
        return snapshot._replace(flip_ratio=share * snapshot.free_flip_ratio)
    if free_flips == 0:
        return snapshot._replace(flip_ratio=flips / len(counted) / NUM_WEIGHTS)
    return snapshot._replace(flip_ratio=min(1.0, flips / free_flips * snapshot.free_flip_ratio))


def _fine_stretches(wanted: Sequence[int], num_steps: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the stretches of steps that are made one by one, in order and without overlap."""
    last_done = 0
    for step in wanted:
        around = window(step, num_steps)
        first = max(last_done + 1, around[0] - FINE_STEPS)
        if around[-1] > last_done:
            yield (1 if first <= FINE_STEPS and last_done == 0 else first), around[-1]
            last_done = around[-1]


class _Weights:
    """The state of the simulated weights."""

    def __init__(self, rule: FlipRule, gradient: float) -> None:
        self.rule, self.gradient = rule, gradient
        self.random = np.random.default_rng(0)
        self.weight: Array = np.where(self._normal() >= 0, np.float32(1), np.float32(-1))
        self.free_weight = self.weight.copy()  # the same with threshold 0
        self.variance_before = self.variance = 0.0  # of m, exact, in units of the gradient's
        self.exp_avg: Array = np.zeros(NUM_WEIGHTS, np.float32)
        self.exp_avg_sq: Array = np.zeros(NUM_WEIGHTS, np.float32)

    def _normal(self) -> Array:
        return self.random.standard_normal(NUM_WEIGHTS, np.float32)

    def step(self, step: int) -> tuple[int, int]:
        """One update, the rule's own; the number of flips, and of those at threshold 0."""
        grad = self._normal() * np.float32(self.gradient)
        gamma = self.rule.gamma(step - 1)
        self.exp_avg += (grad - self.exp_avg) * np.float32(gamma)
        self.variance_before, self.variance = self.variance, (1.0 - gamma) ** 2 * self.variance + gamma**2
        if self.rule.sigma is not None:
            self.exp_avg_sq += (grad * grad - self.exp_avg_sq) * np.float32(self.rule.sigma(step - 1))
        return self._flip(step)

    def stride(self, done: int, length: int) -> None:
        """`length` updates at once after `done` of them, with the rates in their middle."""
        middle = done + length // 2
        kept, squares = _weights_of_stride(self.rule.gamma(middle), length)
        self.variance = kept**2 * self.variance + squares
        self.exp_avg *= np.float32(kept)
        self.exp_avg += self._normal() * np.float32(self.gradient * math.sqrt(squares))
        if self.rule.sigma is not None:
            kept, squares = _weights_of_stride(self.rule.sigma(middle), length)
            added = (1.0 - kept) + self._normal() * np.float32(math.sqrt(2.0 * squares))
            self.exp_avg_sq *= np.float32(kept)
            self.exp_avg_sq += np.maximum(added, 0.0) * np.float32(self.gradient**2)
        self._flip(done + length)

    def _flip(self, step: int) -> tuple[int, int]:
        ratio = self.rule.ratio(self.exp_avg, self.exp_avg_sq, step)
        flips = self.weight * ratio > np.float32(self.rule.threshold(step - 1))
        np.negative(self.weight, out=self.weight, where=flips)
        free_flips = self.free_weight * self.exp_avg > 0
        np.negative(self.free_weight, out=self.free_weight, where=free_flips)
        return int(np.count_nonzero(flips)), int(np.count_nonzero(free_flips))

    def look(self, step: int) -> Snapshot:
        """What there is to see after `step`; the flips are not filled in."""
        rule = self.rule
        ratio = rule.ratio(self.exp_avg, self.exp_avg_sq, step)
        threshold = rule.threshold(step - 1)
        return Snapshot(
            step=step,
            gamma=rule.gamma(step - 1),
            sigma=math.nan if rule.sigma is None else rule.sigma(step - 1),
            threshold=threshold,
            flip_ratio=math.nan,
            free_flip_ratio=free_flip_ratio(rule.gamma(step - 1), self.variance_before),
            dead_band=float(np.mean(np.abs(ratio) <= threshold)),
            ratio_rms=_rms(ratio),
            exp_avg_rms=math.sqrt(self.variance),
            second_moment=float(np.mean(self.exp_avg_sq, dtype=np.float64)) / self.gradient**2,
        )


def _weights_of_stride(rate: float, length: int) -> tuple[float, float]:
    """What a moving average keeps of itself over `length` steps, and the sum of the squared weights of what it takes in."""
    if rate >= 1.0:
        return 0.0, 1.0
    kept = math.exp(length * math.log1p(-rate))
    return kept, rate * -math.expm1(2 * length * math.log1p(-rate)) / (2.0 - rate)


def _rms(values: Array) -> float:
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64))))
