"""The numbers of a report against numbers worked out by hand."""

import math

import pytest

from bitfleet.launch.report.intervals import plateau, spread, steps_to, welch


def test_the_spread_is_that_of_a_sample() -> None:
    found = spread([0.8, 0.9, 1.0, math.nan])
    assert found == pytest.approx((0.9, 0.1, 3))
    one = spread([0.5])
    assert one is not None
    assert math.isnan(one.sd)
    assert spread([math.nan]) is None


def test_the_interval_is_welchs() -> None:
    first, second = [0.88, 0.90, 0.92], [0.80, 0.86, 0.83, 0.81]
    difference = welch(first, second)
    assert difference is not None
    # By hand: the variances of the means are 4e-4/3 and 7e-4/4 and 4.9782 degrees of freedom give t
    # = 2.573974.
    assert difference == pytest.approx((0.075, 0.0298025, 0.1201975), abs=1e-6)
    assert difference.is_clear
    # By hand: s = 1 and n = 2 twice: the error is 1, 2 degrees of freedom, t = 4.3027.
    half = 0.5**0.5
    wide = welch([3 - half, 3 + half], [1 - half, 1 + half])
    assert wide == pytest.approx((2.0, 2 - 4.302653, 2 + 4.302653))
    assert wide is not None
    assert not wide.is_clear


def test_one_seed_has_no_interval_and_equal_seeds_have_one_of_no_width() -> None:
    assert welch([0.9], [0.7, 0.8, 0.9]) is None
    equal = welch([0.9, 0.9], [0.9, 0.9])
    assert equal == (0.0, 0.0, 0.0)
    assert not equal.is_clear
    one_sided = welch([0.9, 0.9, 0.9], [0.7, 0.8, 0.9])
    assert one_sided is not None
    assert one_sided.low < 0.1 < one_sided.high


def test_steps_are_those_of_the_first_validation_that_reaches_the_level() -> None:
    steps, values = [10, 20, 30, 40], [0.5, 0.8, 0.7, 0.9]
    assert steps_to(steps, values, 0.8) == 20
    assert steps_to(steps, values, 0.81) == 40
    assert steps_to(steps, values, 0.91) is None
    assert steps_to([], [], 0.1) is None


def test_the_region_ends_where_the_straight_line_falls_a_point_below_the_best() -> None:
    settings = [1e-9, 1e-8, 1e-7, 1e-6, 1e-5]
    # To the left 4 points are lost in a decade: a point in a quarter. To the right the next loses
    # half a point, the one after it two more: half a point in a quarter of the second decade.
    found = plateau(settings, [0.80, 0.84, 0.88, 0.875, 0.855])
    assert found is not None
    assert found.low == pytest.approx(10**-7.25)
    assert found.high == pytest.approx(10**-5.75)
    assert found.decades == pytest.approx(1.5)
    assert not found.open_low
    assert not found.open_high


def test_the_region_is_open_where_nothing_further_was_tried_and_ends_before_a_failure() -> None:
    found = plateau([1e-3, 1e-2, 1e-1, 1.0], [0.90, 0.895, None, 0.9])
    assert found is not None
    assert (found.low, found.high, found.open_low, found.open_high) == (1e-3, 1e-2, True, False)
    assert plateau([1.0, 2.0], [None, None]) is None
    # A point exactly one point below still counts, whatever the last bit says.
    assert plateau([1.0, 10.0], [0.89, 0.88])[0] == pytest.approx(1.0)  # type: ignore[index]
