import dataclasses
import json
import math
from pathlib import Path

import pytest

from bitfleet.launch.reproduce.curves import Curve, Point, expected_at, expected_curve, read_curves
from bitfleet.launch.reproduce.papers import PAPERS, dry_run_of

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
    ("points", "message"),
    [
        ([], r"points of the curve 'c' are after \[\] epochs"),
        ([(1, 5, 1), (1, 6, 1), (100, 7, 1)], "expected rising numbers"),
        ([(0, 5, 1), (100, 7, 1)], "above 0"),
        ([(1, 5, 1), (90, 7, 1)], "end with its length, 100"),
        ([(1, 101, 1), (100, 7, 1)], "expected epochs, top-1 in percent"),
        ([(1, 5, 0), (100, 7, 1)], "tolerance above 0"),
    ],
)
def test_points_that_are_no_curve(points: list[tuple[float, float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CURVE, points=tuple(Point(*point) for point in points))


def test_file_of_another_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"curves": [{"name": "a"}]}')
    with pytest.raises(ValueError, match="x.json is not a file of curves.*points"):
        read_curves("x", tmp_path)
    # a card has a curve without tolerances
    curve = {**dataclasses.asdict(CURVE), "points": [[1, 5.0, None], [100, 9.0, None]]}
    (tmp_path / "x.json").write_text(json.dumps({"curves": [curve]}))
    with pytest.raises(ValueError, match="x.json is not a file of curves"):
        read_curves("x", tmp_path)


def test_first_curve_counts_and_none_may_be_known(tmp_path: Path) -> None:
    for paper in PAPERS.values():
        found = expected_curve(paper.curves)
        assert (found is None) == (paper.name == "binarynet")
        dry = expected_curve(dry_run_of(paper).curves)
        assert dry is not None
        assert dry.epochs == 6
    curves = [dataclasses.asdict(CURVE) | {"name": name} for name in ("ours", "theirs")]
    (tmp_path / "x.json").write_text(json.dumps({"curves": curves}))
    assert [curve.name for curve in read_curves("x", tmp_path)] == ["ours", "theirs"]


def test_tolerance_is_twice_what_schedules_alone_make() -> None:
    """The two curves of larq-zoo, each measured from its own end, at the fractions where both are known."""
    birealnet, xnornet = expected_curve("birealnet18"), expected_curve("xnornet")
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
