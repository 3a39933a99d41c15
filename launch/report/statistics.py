"""The numbers of a report: spread over seeds, Welch's interval, steps to a level, width of a plateau."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

WITHIN = 0.01
"""How far below the best still counts as good: one point of accuracy."""
CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1) of `num` values; sd is nan for one."""

    mean: float
    sd: float
    num: int


class Difference(NamedTuple):
    """Difference of two means and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0.0 or self.high < 0.0


class Plateau(NamedTuple):
    """The region of a hyperparameter around its best value in which accuracy stays good."""

    decades: float
    """log10(high / low)."""
    low: float
    high: float
    open_low: bool
    """The region reaches the smallest value that was tried: it may be wider."""
    open_high: bool
    """The same at the largest value."""


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation of the finite `values`; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    sd = float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan
    return Spread(float(np.mean(finite)), sd, len(finite))


def welch(first: Spread, second: Spread) -> Difference | None:
    """`first` - `second` with Welch's 95 % interval (unequal variances); None where either has fewer than two values.

    Source: Welch, Biometrika 34 (1947); degrees of freedom by Welch and Satterthwaite. Without any spread in both the interval
    has no width.
    """
    if first.num < 2 or second.num < 2:
        return None
    a, b = first.sd**2 / first.num, second.sd**2 / second.num
    value = first.mean - second.mean
    if a + b == 0.0:
        return Difference(value, value, value)
    freedom = (a + b) ** 2 / (a**2 / (first.num - 1) + b**2 / (second.num - 1))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(a + b)
    return Difference(value, value - half, value + half)


def steps_to(steps: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The first of `steps` whose value is at least `level`; None if none is."""
    return next((step for step, value in zip(steps, values, strict=True) if value >= level), None)


def plateau(settings: Sequence[float], accuracies: Sequence[float | None], within: float = WITHIN) -> Plateau | None:
    """The region around the best setting in which accuracy stays within `within` of the best.

    Between the last good setting and the first bad one accuracy is taken as linear in the logarithm of the setting. A setting
    that failed (None) ends the region at its last good neighbour.

    Args:
        settings: positive, ascending.
        accuracies: of each setting, fractions; None where no run finished.
        within: allowed loss.

    Returns:
        None without any accuracy.
    """
    known = [(accuracy, index) for index, accuracy in enumerate(accuracies) if accuracy is not None]
    if not known:
        return None
    assert all(low < high for low, high in itertools.pairwise(settings)), "ascending"
    best, center = max(known, key=lambda pair: (pair[0], -pair[1]))
    floor = best - within
    low, open_low = _edge(settings, accuracies, center, -1, floor)
    high, open_high = _edge(settings, accuracies, center, 1, floor)
    return Plateau(math.log10(high / low), low, high, open_low, open_high)


def _edge(
    settings: Sequence[float], accuracies: Sequence[float | None], center: int, direction: int, floor: float
) -> tuple[float, bool]:
    """(setting at which the region ends on one side, whether that is the end of what was tried)."""
    inside, good = center, accuracies[center]
    assert good is not None
    while 0 <= (following := inside + direction) < len(settings):
        accuracy = accuracies[following]
        if accuracy is None:
            return settings[inside], False
        if accuracy < floor - 1e-12:
            part = (good - floor) / (good - accuracy)
            return settings[inside] * (settings[following] / settings[inside]) ** part, False
        inside, good = following, accuracy
    return settings[inside], True
