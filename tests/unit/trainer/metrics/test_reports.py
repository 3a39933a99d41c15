"""When a training loss is called grown."""

import math

import pytest

from bitfleet.trainer.metrics import LossWatch


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.3, 1.8, 5.0, 20.0], []),
        ([2.3, 400.0], [1]),
        ([1e6], [0]),  # diverged before the first report
        ([1.0, 0.001, 2.0], []),  # noise around a loss near 0
        ([0.5, 60.0, 70.0, 5999.0, 6001.0], [1, 4]),  # once for every two orders of magnitude
    ],
)
def test_said_for_each_two_orders_of_magnitude(losses: list[float], said: list[int]) -> None:
    watch = LossWatch(10)
    assert [index for index, loss in enumerate(losses) if watch.sentence(index, loss)] == said


def test_names_loss_step_and_smallest() -> None:
    sentence = LossWatch(10, [2.0, None, 0.4]).sentence(1200, 80.0)
    assert "grew to 80 at step 1,200, 200 times the smallest before it (0.4)" in sentence


def test_a_continued_run_does_not_repeat_it() -> None:
    assert LossWatch(10, [0.4, 80.0]).sentence(9, 90.0) == ""


def test_guessing_is_what_a_run_begins_with() -> None:
    assert LossWatch(1000).sentence(1, 99 * math.log(1000)) == ""
    assert LossWatch(1000).sentence(1, 101 * math.log(1000)) != ""


def test_guessing_under_a_loss_that_is_scaled() -> None:
    assert LossWatch(10, scale=400.0).sentence(1, 900.0) == ""
    assert LossWatch(10, scale=400.0).sentence(1, 401 * 100 * math.log(10)) != ""
