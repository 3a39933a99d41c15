import dataclasses
import json
import math
from pathlib import Path

import pytest

from bitfleet.configs import load_config
from bitfleet.launch.reproduce.curves import Curve, Point, expected_at, expected_curve, stand, watcher
from bitfleet.launch.reproduce.papers import PAPERS, find_paper
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.metrics import Accuracy

CURVE = Curve(
    name="c",
    recipe="",
    comparable="",
    source="",
    epochs=100,
    points=(Point(2, 10.0, 8.0), Point(50, 40.0, 4.0), Point(100, 50.0, 2.0)),
)


def test_expected_at_points_and_between() -> None:
    assert expected_at(CURVE, 0.5) == Point(50, 40.0, 4.0)
    assert expected_at(CURVE, 1.0) == Point(100, 50.0, 2.0)
    half_way = expected_at(CURVE, math.sqrt(2 * 50) / 100)  # the middle of the logarithms
    assert half_way is not None
    assert half_way == pytest.approx((10.0, 25.0, 6.0))


def test_nothing_is_expected_before_the_first_point() -> None:
    assert expected_at(CURVE, 0.01) is None
    third = dataclasses.replace(CURVE, epochs=3, points=(Point(1, 10.0, 8.0), Point(3, 50.0, 2.0)))
    assert expected_at(third, 1 / 3) == pytest.approx((1, 10.0, 8.0))  # 1/3 * 3 may be a bit below 1


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1, 5, 1), (1, 6, 1), (100, 7, 1)],
        [(0, 5, 1), (100, 7, 1)],
        [(1, 5, 1), (90, 7, 1)],
        [(1, 101, 1), (100, 7, 1)],
        [(1, 5, 0), (100, 7, 1)],
    ],
)
def test_points_that_are_not_a_curve(points: list[tuple[float, float, float]]) -> None:
    with pytest.raises(ValueError, match=r"'c' .* 100") as raised:
        dataclasses.replace(CURVE, points=tuple(Point(*point) for point in points))
    assert str(points) in str(raised.value)


def test_file_of_another_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"curves": [{"name": "a"}]}')
    with pytest.raises(ValueError, match=r"x\.json.*points"):
        expected_curve("x", tmp_path)
    # a card has a curve without tolerances
    curve = {**dataclasses.asdict(CURVE), "points": [[1, 5.0, None], [100, 9.0, None]]}
    (tmp_path / "x.json").write_text(json.dumps({"curves": [curve]}))
    with pytest.raises(ValueError, match=r"x\.json"):
        expected_curve("x", tmp_path)


def test_first_curve_counts_and_none_may_be_known(tmp_path: Path) -> None:
    for name, paper in PAPERS.items():
        assert (expected_curve(paper.config) is None) == (name == "binarynet")
        dry = expected_curve(find_paper(name, dry_run=True).config)
        assert dry is not None
        assert dry.epochs == 6
    curves = [dataclasses.asdict(CURVE) | {"name": name} for name in ("ours", "theirs")]
    (tmp_path / "x.json").write_text(json.dumps({"curves": curves}))
    assert expected_curve("x", tmp_path) == dataclasses.replace(CURVE, name="ours")


def run_of(epochs: int = 100, num_classes: int = 1000) -> TrainConfig:
    config = load_config("birealnet18_imagenet")
    model = dataclasses.replace(config.model, num_classes=num_classes)
    return dataclasses.replace(config, epochs=epochs, model=model)


@pytest.mark.parametrize(
    ("top1", "word", "difference"),
    [
        (40.0, "on track", 0.0),
        (36.0, "on track", -4.0),
        (35.9, "off", -4.1),
        (44.0, "on track", 4.0),
        (44.1, "off", 4.1),
    ],
)
def test_words(top1: float, word: str, difference: float) -> None:
    standing = stand(CURVE, 50, run_of(), top1)
    assert standing.word == word
    assert standing.difference == pytest.approx(difference)


def test_run_of_another_length_is_compared_at_the_same_fraction() -> None:
    assert stand(CURVE, 5, run_of(10), 41.0)[3:] == (40.0, 4.0, "on track")
    assert stand(CURVE, 10, run_of(10), 41.0)[3:] == (50.0, 2.0, "off")


def test_too_early_where_guessing_would_be_on_track() -> None:
    assert stand(CURVE, 2, run_of(num_classes=50), 3.0).word == "too early"
    assert stand(CURVE, 2, run_of(num_classes=100), 3.0).word == "on track"
    assert stand(CURVE, 2, run_of(num_classes=50), 30.0).word == "off"  # far above is always off
    assert stand(CURVE, 1, run_of(num_classes=100), 3.0)[3:] == (None, None, "too early")


@pytest.mark.parametrize(("name", "epochs"), [("birealnet18_imagenet", 150), ("xnornet_imagenet", 100)])
def test_network_that_only_guesses_is_off_at_epoch_8(name: str, epochs: int) -> None:
    """1 / gamma is 8 epochs; before that a slow start does not count against a run."""
    curve = expected_curve(name)
    assert stand(curve, 8, run_of(epochs), 0.1).word == "off"
    assert stand(curve, 1, run_of(epochs), 0.1).word == "too early"


def test_sentences_count_epochs_in_steps_and_percent() -> None:
    def said(epochs_done: float, top1: float, curve: Curve | None = CURVE) -> str:
        compare = watcher(curve, run_of(10), steps_per_epoch=70)
        return compare(round(70 * epochs_done), Accuracy(1.0, top1 / 100, 0.9, 100))

    assert "on track at epoch 5/10: top-1 41.00 %, expected 40.00 +- 4.0 (c at 50 % of its run)" in said(5, 41.0)
    assert "off by -27.5 points at epoch 5/10: top-1 12.50 %, expected 40.00" in said(5, 12.5)
    assert "too early to tell at epoch 0.1/10" in said(0.1, 1.0)
    assert "top-1 60.00 % at epoch 3/10" in said(3, 60.0, None)


@pytest.mark.parametrize(
    ("name", "tenth", "end"),
    [("quicknet_small", 43.4, 59.35), ("quicknet", 48.1, 63.25), ("quicknet_large", 47.3, 66.89)],
)
def test_quicknets_curves(name: str, tenth: float, end: float) -> None:
    """Epochs are published from 0 on: the accuracy of epoch 9 is that after 10 epochs."""
    curve = expected_curve(PAPERS[name].config)
    assert curve is not None
    assert expected_at(curve, 10 / 600) == Point(10, tenth, 5.0)
    assert expected_at(curve, 1.0) == Point(600, end, 1.0)
    assert end == pytest.approx(PAPERS[name].top1, abs=0.06)
    assert load_config(PAPERS[name].config).epochs == curve.epochs


def test_tolerance_is_twice_what_schedules_alone_make() -> None:
    """The two curves of larq-zoo from their ends, at the fractions where both are known."""
    birealnet, xnornet = expected_curve("birealnet18_imagenet"), expected_curve("xnornet_imagenet")
    assert birealnet is not None
    assert xnornet is not None

    def missing(curve: Curve, fraction: float) -> float:
        point = expected_at(curve, fraction)
        assert point is not None
        return curve.points[-1].top1 - point.top1

    fractions = sorted({p.epochs_done / c.epochs for c in (birealnet, xnornet) for p in c.points if p.epochs_done > 1})
    apart = max(abs(missing(birealnet, each) - missing(xnornet, each)) for each in fractions)
    assert 4.5 < apart < 5.5
    for curve in (birealnet, xnornet):
        assert {point.tolerance for point in curve.points if 20 <= point.epochs_done < curve.epochs} == {10.0}
