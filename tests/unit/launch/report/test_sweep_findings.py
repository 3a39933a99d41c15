"""Findings in synthetic sweeps whose answers are known."""

import dataclasses
import json
from pathlib import Path

import pytest

from bitfleet.configs.sweeps import available_sweeps, load_sweep
from bitfleet.configs.sweeps.sweep import EACH_POINT, TABLE, Figure
from bitfleet.launch.report import write_report
from bitfleet.launch.report.intervals import Spread, plus_minus
from bitfleet.launch.report.sweep_findings import answer, fastest, grids, levels, slopes, speeds
from bitfleet.launch.report.sweep_plots import facets, mean_curve
from bitfleet.launch.report.sweep_results import read_sweep, show
from tests.conftest import REPOSITORY
from tests.unit.launch.report import synthetic


def test_the_answer_names_the_best_and_how_sure_that_is(tmp_path: Path) -> None:
    sentences = answer(read_sweep(synthetic.rules(tmp_path, 3, 3)))
    assert sentences[0] == "Best: rule_0 with 90.0 ± 0.4 % top-1 (mean ± standard deviation of 3 seeds)."
    # Two spreads of 0.4 over 3 seeds: an error of 0.3266 points, 4 degrees of freedom, t = 2.7764:
    # 1.5 +- 0.907.
    assert "difference of 1.5 points (95 % interval +0.59 to +2.41, Welch) is more than" in sentences[1]
    assert sentences[2].startswith("All 2 other points")
    assert len(sentences) == 3


def test_a_difference_within_the_spread_is_called_that(tmp_path: Path) -> None:
    rows = [
        synthetic.row({"rule": rule}, seed, top1 + 0.01 * seed)
        for rule, top1 in (("a", 0.8), ("b", 0.805))
        for seed in (0, 1, 2)
    ]
    sentences = answer(read_sweep(synthetic.write(tmp_path, ["rule"], rows)))
    assert sentences[0].startswith("Best: b with 81.5 ± 1.0 %")
    assert "is no more than the spread" in sentences[1]


def test_one_seed_is_not_called_sure(tmp_path: Path) -> None:
    sentences = answer(read_sweep(synthetic.rules(tmp_path, 3, 1)))
    assert "(one seed)" in sentences[0]
    assert "1.5 points behind; a spread needs at least two seeds" in sentences[1]


def test_what_is_missing_is_counted(tmp_path: Path) -> None:
    results = read_sweep(synthetic.grid(tmp_path))
    assert answer(results)[-1] == "Incomplete: of 75 runs 3 failed and 1 not run yet."
    unfinished = [run for point in results.points for run in point.others]
    assert [run.status for run in unfinished] == ["pending", "failed", "failed", "failed"]
    assert "nan" in unfinished[-1].error


def test_convergence_counts_the_seeds_that_arrive(tmp_path: Path) -> None:
    results = read_sweep(synthetic.rules(tmp_path, 9, 3))
    assert levels(results) == [0.72, 0.81, 0.85]
    # rule_0: 0.9 (1 - exp(-0.05 step)) is 0.778 after 40 steps, 0.855 after 60; for the worst seed
    # 0.8514.
    assert [speed.reached for speed in speeds(results.points[0], levels(results))] == [(40,) * 3, (60,) * 3, (60,) * 3]
    # rule_6 ends at 80.6, 81.0 and 81.4 %: its curve is 81 % or more at the last step for two.
    (speed,) = speeds(results.points[6], [0.81])
    assert (speed.reached, speed.num) == ((160, 160), 3)
    assert (
        fastest(results)
        == "First to 85 % top-1: rule_0, after 60 ± 0 steps; 5 of 9 points have seeds that never reach it."
    )


def test_robustness_is_measured_along_each_axis_through_the_best(tmp_path: Path) -> None:
    gamma, threshold = slopes(read_sweep(synthetic.grid(tmp_path)))
    # gamma loses 1.2 points in a decade: one point in 1/1.2 of it, on both sides; threshold loses
    # one point in two.
    assert gamma.axis == "gamma"
    assert gamma.region.decades == pytest.approx(2 / 1.2)
    assert gamma.decades_of_seeds == pytest.approx((2 / 1.2,) * 3)
    assert (threshold.region.decades, threshold.region.open_low, threshold.region.open_high) == (
        pytest.approx(4),
        True,
        True,
    )


def test_axes_swept_alone_are_each_measured_and_zero_stands_apart(tmp_path: Path) -> None:
    results = read_sweep(synthetic.one_at_a_time(tmp_path))
    found = {slope.axis: slope for slope in slopes(results)}
    assert list(found) == ["gamma", "sigma", "threshold"]
    assert all(slope.region.decades == pytest.approx(2.0) for slope in found.values())
    assert found["gamma"].zero is None
    assert found["threshold"].zero is not None
    assert len(found["threshold"].points) == 5
    assert grids(results) == []


def test_a_star_of_points_is_named_and_drawn_from_its_centre(tmp_path: Path) -> None:
    results = read_sweep(synthetic.star(tmp_path))
    assert results.figure.centre == {"gamma": 1e-7, "sigma": 1e-3, "threshold": 1e-6}
    names = [point.name for point in results.points]
    assert names[:3] == ["gamma 1e-7, sigma 1e-3, threshold 1e-6", "gamma 1e-9", "gamma 1e-8"]
    assert names[-2:] == ["threshold 1e-5", "threshold 1e-4"]
    assert len(names) == 13
    panels = facets(results)
    assert [(panel.name, panel.labels[2], len(panel.points)) for panel in panels] == [
        ("gamma", "1e-7", 5),
        ("sigma", "1e-3", 5),
        ("threshold", "1e-6", 5),
    ]
    assert [slope.region.decades for slope in slopes(results)] == pytest.approx([2.0, 2.0, 2.0])
    assert grids(results) == []


def test_around_a_centre_every_axis_is_measured_also_where_another_point_is_the_best(tmp_path: Path) -> None:
    centre = {"gamma": "1e-07", "threshold": "1e-06"}
    away = {"gamma": {"1e-09": 0.78, "1e-05": 0.795}, "threshold": {"1e-08": 0.7, "0.0001": 0.82}}
    rows = [synthetic.row(centre, 0, 0.8)]
    rows += [synthetic.row({**centre, axis: at}, 0, top1) for axis, each in away.items() for at, top1 in each.items()]
    figure = Figure(centre={"gamma": 1e-7, "threshold": 1e-6}, robustness=("gamma", "threshold"))
    gamma, threshold = slopes(read_sweep(synthetic.write(tmp_path, ["gamma", "threshold"], rows, figure)))
    # The best point, threshold 1e-4, has no other gamma next to it: gamma is measured through the
    # centre.
    assert [point.get("gamma") for point in gamma.points] == [1e-9, 1e-7, 1e-5]
    # One point in half of the two decades that lose two, and the whole two decades that lose half a
    # point.
    assert gamma.region.decades == pytest.approx(3.0)
    assert [point.get("threshold") for point in threshold.points] == [1e-8, 1e-6, 1e-4]
    assert threshold.region.decades == pytest.approx(1.0)


def test_words_make_slopes_of_their_own(tmp_path: Path) -> None:
    rows = [
        synthetic.row({"rule": rule, "gamma": f"1e-{power}"}, 0, 0.9 - loss * abs(power - 5))
        for rule, loss in (("bop", 0.02), ("bop2ndorder", 0.004))
        for power in (4, 5, 6)
    ]
    found = slopes(read_sweep(synthetic.write(tmp_path, ["rule", "gamma"], rows, Figure(robustness=("gamma",)))))
    assert [(slope.group, slope.region.decades) for slope in found] == [
        ("bop", pytest.approx(1.0)),
        ("bop2ndorder", pytest.approx(2.0)),
    ]


def test_pairs_of_axes_become_grids(tmp_path: Path) -> None:
    results = read_sweep(synthetic.grid(tmp_path))
    (grid,) = grids(results)
    assert (grid.x_axis, grid.y_axis) == ("gamma", "threshold")
    assert grid.x_values == pytest.approx((1e-9, 1e-8, 1e-7, 1e-6, 1e-5))
    assert grid.cells[1e-5, 1e-8].top1 is None
    assert plus_minus(grid.cells[1e-7, 1e-6].top1) == "88.0 ± 0.2"
    assert [len(facet.points) for facet in facets(results)] == [5, 5, 5, 5, 4]


def test_a_mean_curve_has_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    rows = [synthetic.row({"rule": "a"}, 0, 0.8, number=8), synthetic.row({"rule": "a"}, 1, 0.9, number=4)]
    (point,) = read_sweep(synthetic.write(tmp_path, ["rule"], rows)).points
    curve, spreads = mean_curve(point, "top1")
    assert curve.steps == (20, 40, 60, 80)
    assert spreads[0].num == 2


def test_numbers_are_written_for_readers() -> None:
    assert [show(value) for value in (1e-7, 1.5e-4, 0.0, 0.05, 128.0, 1e5, "linear")] == [
        *("1e-7", "1.5e-4", "0", "0.05", "128", "1e5", "linear"),
    ]
    assert plus_minus(None) == "-"
    assert plus_minus(Spread(0.5, float("nan"), 1)) == "50.0"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"status": "done"}, "status is 'done'"),
        ({"seed": "x"}, "seed is 'x', expected a whole number"),
        ({"end.top1": "high"}, "end.top1 is 'high'"),
        ({"curve.top1": "[0.1"}, "curve.top1 is '[0.1'"),
        (
            {"curve.step": "[2000, 1000]", "curve.top1": "[0.1, 0.2]"},
            "curve.step is '[2000, 1000]', expected ascending",
        ),
        ({"curve.top1": "[0.1]"}, "curve.top1 has 1 values, but curve.step has 8"),
        ({"axis.gamma": "inf"}, "axis.gamma is 'inf', expected a finite number"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, change: dict[str, str], sentence: str) -> None:
    labels = {"rule": "a", "gamma": "0.1"}
    rows = [synthetic.row(labels, 0, 0.8), synthetic.row(labels, 1, 0.8) | change]
    synthetic.write(tmp_path, ["rule", "gamma"], rows, axes={"rule": ["a"], "gamma": [0.1]})
    with pytest.raises(ValueError, match=r"sweep.csv:3: ") as caught:
        read_sweep(tmp_path)
    assert sentence in str(caught.value)


def test_curves_longer_than_a_cell_of_the_csv_module_are_read(tmp_path: Path) -> None:
    number = 30_000
    row = synthetic.row({"rule": "a"}, 0, 0.8, number=number)
    assert len(row["curve.top1"]) > 131072  # the module's own limit
    synthetic.write(tmp_path, ["rule"], [row])
    (point,) = read_sweep(tmp_path).points
    assert len(point.finished[0].curves["top1"].steps) == number


def test_panels_and_names_are_those_of_the_declaration(tmp_path: Path) -> None:
    rows = [
        synthetic.row({"rule": rule, "norm": norm}, 0, 0.8) for rule in ("bop", "adam") for norm in ("batch", "layer")
    ]
    figure = Figure(facets="norm", labels={"batch": "BatchNorm"})
    results = read_sweep(synthetic.write(tmp_path, ["rule", "norm"], rows, figure))
    assert [(facet.name, facet.labels) for facet in facets(results)] == [
        ("norm BatchNorm", ["bop", "adam"]),
        ("norm layer", ["bop", "adam"]),
    ]
    alone = dataclasses.replace(results, figure=Figure(facets=EACH_POINT))
    assert [len(facet.points) for facet in facets(alone)] == [1] * 4
    (panel,) = facets(dataclasses.replace(results, figure=Figure()))
    assert [point.name for point in panel.points] == ["bop, batch", "bop, layer", "adam, batch", "adam, layer"]


def test_panel_of_too_many_lines_keeps_the_best(tmp_path: Path) -> None:
    (panel,) = facets(read_sweep(synthetic.rules(tmp_path, 14, 1)))
    assert [point.name for point in panel.points] == [f"rule_{number}" for number in range(10)]


def test_order_of_the_declaration_and_values_that_it_does_not_have(tmp_path: Path) -> None:
    rows = [synthetic.row({"rule": rule}, 0, 0.8) for rule in ("new", "a", "b")]
    results = read_sweep(synthetic.write(tmp_path, ["rule"], rows, axes={"rule": ["b", "a"]}))
    assert [point.name for point in results.points] == ["b", "a", "new"]


def test_a_panel_of_an_axis_has_values_that_the_declaration_does_not_have(tmp_path: Path) -> None:
    folder = synthetic.star(tmp_path)
    facts = json.loads((folder / "sweep.json").read_text())
    facts["axes"]["gamma"].remove(1e-9)
    (folder / "sweep.json").write_text(json.dumps(facts))
    panel = facets(read_sweep(folder))[0]
    assert (panel.name, panel.labels) == ("gamma", ["1e-8", "1e-7", "1e-6", "1e-5", "1e-9"])


def without_figure(folder: Path) -> Path:
    """Turn sweep.json into one of version 0.1."""
    facts = json.loads((folder / "sweep.json").read_text())
    del facts["figure"]
    (folder / "sweep.json").write_text(json.dumps(facts))
    return folder


def test_sweep_of_an_earlier_version_is_declared_by_its_name(tmp_path: Path) -> None:
    rows = [synthetic.row({"variant": name}, 0, 0.8) for name in ("frozen v", "published")]
    known = read_sweep(without_figure(synthetic.write(tmp_path / "1", ["variant"], rows, name="regime")))
    assert known.figure == load_sweep("regime").figure
    assert [point.name for point in known.points] == ["published", "frozen v"]
    for name, axis in (("regime", "norm"), ("another", "variant")):
        rows = [synthetic.row({axis: value}, 0, 0.8) for value in ("b", "a")]
        other = read_sweep(without_figure(synthetic.write(tmp_path / axis, [axis], rows, name=name)))
        assert other.figure == TABLE
        assert [point.name for point in other.points] == ["b", "a"]


def test_plain_table_has_no_pictures(tmp_path: Path) -> None:
    page, _ = write_report([without_figure(synthetic.rules(tmp_path / "x", 3, 2))])
    assert "rule_0" in page.read_text()
    assert not list((tmp_path / "x" / "report").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"figure": {"facets": 3}},
        {"config": 3},
        {"config": {"model": None}},
        {"config": {"model": {"num_classes": "ten"}}},
        {"options": 5},
    ],
)
def test_damaged_facts_are_one_sentence(change: dict[str, object], tmp_path: Path) -> None:
    folder = synthetic.rules(tmp_path, 2, 1)
    facts = json.loads((folder / "sweep.json").read_text()) | change
    (folder / "sweep.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"sweep.json[^\n]*$"):
        read_sweep(folder)


RECORDED = sorted(path.parent.name for path in (REPOSITORY / "docs/results").glob("*/sweep.csv"))


@pytest.mark.parametrize("name", sorted({*RECORDED} & {*available_sweeps()}))
def test_results_of_the_repository_are_drawn_as_declared(name: str) -> None:
    results = read_sweep(REPOSITORY / "docs" / "results" / name)
    assert results.figure == load_sweep(name).figure
    assert {point.labels for point in results.points} <= {tuple(p.labels.items()) for p in load_sweep(name).points}
    assert len(grids(results)) == len(results.figure.grids)
    assert {slope.axis for slope in slopes(results)} == set(results.figure.robustness)
