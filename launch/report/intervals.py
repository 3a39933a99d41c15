"""The statistics of a report: spread over seeds, Welch's interval, steps to a level, width of a
plateau."""

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_ind

WITHIN = 0.01
"""Accuracy below the best that still counts as good: one percentage point."""
CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1) of `num` values; sd is nan for one value."""

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
        """Return True if the interval excludes 0."""
        return self.low > 0.0 or self.high < 0.0


class Plateau(NamedTuple):
    """Region of a hyperparameter around its best value in which accuracy stays good."""

    decades: float
    """log10(high / low)."""
    low: float
    high: float
    open_low: bool
    """True if the region reaches the smallest value that was tried, and may be wider."""
    open_high: bool
    """True if it reaches the largest value that was tried."""


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and standard deviation of the finite `values`; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    sd = float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan
    return Spread(float(np.mean(finite)), sd, len(finite))


def plus_minus(value: Spread | None, scale: float = 100.0, digits: int = 1) -> str:
    """Write mean ± standard deviation; "-" for None."""
    if value is None:
        return "-"
    text = f"{scale * value.mean:.{digits}f}"
    return text if math.isnan(value.sd) else f"{text} ± {scale * value.sd:.{digits}f}"


def welch(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """Return mean(first) - mean(second) with the 95 % interval of Welch's t-test.

    None if either has fewer than two values; no width if neither has a spread.
    """
    if min(len(first), len(second)) < 2:
        return None
    value = float(np.mean(first) - np.mean(second))
    if np.ptp(first) == np.ptp(second) == 0.0:
        return Difference(value, value, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one of them without a spread
        low, high = ttest_ind(first, second, equal_var=False).confidence_interval(CONFIDENCE)
    return Difference(value, float(low), float(high))


def steps_to(steps: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Return the first of `steps` whose value is at least `level`; None without one."""
    return next((step for step, value in zip(steps, values, strict=True) if value >= level), None)


def plateau(settings: Sequence[float], accuracies: Sequence[float | None], within: float = WITHIN) -> Plateau | None:
    """Return the region around the best setting in which accuracy stays within `within` of the
    best.

    Between the last good setting and the first bad one, accuracy is interpolated linearly in the
    logarithm of the setting. A setting that failed (None) ends the region at its last good
    neighbour.

    Args:
        settings: positive, ascending.
        accuracies: fraction per setting; None where no run finished. Without any the result is
            None.
        within: allowed loss of accuracy.
    """
    known = [(accuracy, -index) for index, accuracy in enumerate(accuracies) if accuracy is not None]
    if not known:
        return None
    assert all(low < high for low, high in itertools.pairwise(settings)), "ascending"
    best, index = max(known)
    low, open_low = _edge(settings, accuracies, -index, -1, best - within)
    high, open_high = _edge(settings, accuracies, -index, 1, best - within)
    return Plateau(math.log10(high / low), low, high, open_low, open_high)


def _edge(
    settings: Sequence[float], accuracies: Sequence[float | None], centre: int, direction: int, floor: float
) -> tuple[float, bool]:
    """Return the setting at which the region ends on one side, and whether it is the last one that
    was tried."""
    inside, good = centre, accuracies[centre]
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
