"""Several runs on one page: seeds of one setting together, settings against each other."""

from pathlib import Path

from bitfleet.launch.report import write_report
from bitfleet.launch.report.run_comparison import compare, differences
from bitfleet.launch.report.run_results import read_run
from tests.unit.launch.report import made_up


def test_seeds_are_one_point_and_settings_are_named(tmp_path: Path) -> None:
    runs = [
        made_up.run_folder(tmp_path / f"{rule}{seed}", seed=seed, rule=rule, more=more + 0.01 * seed)
        for rule, more in (("bop", 0.0), ("bop2ndorder", 0.1))
        for seed in range(2)
    ]
    page, (line, *others) = write_report(runs, tmp_path / "report")
    assert line.startswith("4 runs compared: Best: bop2ndorder with 80.5 ± 0.7 % top-1")
    assert "Next: bop with 70.5 ± 0.7 %" in line
    assert len(others) == 4
    pictures = {path.name for path in (tmp_path / "report" / "report").iterdir()}
    assert {"runs-compared-top1.png", "runs-compared-curves.png", "runs-compared-flips.png"} <= pictures
    assert page.read_text().index("4 runs compared") < page.read_text().index("made_up</h2>")


def test_only_what_tells_runs_apart_names_them_and_the_table_has_all(tmp_path: Path) -> None:
    runs = [read_run(made_up.run_folder(tmp_path / rule, rule=rule)) for rule in ("bop", "bnew")]
    for run, size in zip(runs, (64, 128), strict=True):
        run.facts["config"]["data"]["image_size"] = size  # known once the rule is
    results = compare(runs)
    assert results is not None
    assert [point.labels for point in results.points] == [(("rule", "bop"),), (("rule", "bnew"),)]
    table = differences(runs).table
    assert table is not None
    assert table.header == ("run", "seed", "data.image_size", "rule")
    assert [row[1:] for row in table.rows] == [("0", "64", "bop"), ("0", "128", "bnew")]


def test_runs_of_several_configurations_are_not_held_against_the_published_accuracy_of_one(tmp_path: Path) -> None:
    runs = [read_run(made_up.run_folder(tmp_path / rule, rule=rule)) for rule in ("bop", "bnew")]
    for name in ("birealnet18_imagenet", "xnornet_imagenet"):
        runs[0].facts["config"]["name"] = "birealnet18_imagenet"
        runs[1].facts["config"]["name"] = name
        results = compare(runs)
        assert results is not None
        assert results.base == (name if name == "birealnet18_imagenet" else "several")


def test_a_run_that_goes_on_says_how_far_it_is(tmp_path: Path) -> None:
    runs = [read_run(made_up.run_folder(tmp_path / str(lines), lines)) for lines in (12, 8)]
    results = compare(runs)
    assert results is not None
    assert [point.name for point in results.points] == ["as configured", "after 2.0 of 3 epochs"]
    block = differences(runs)
    assert block.text == "Nothing but the seed."


def test_runs_without_a_validation_are_not_compared(tmp_path: Path) -> None:
    assert compare([read_run(made_up.run_folder(tmp_path / str(lines), lines)) for lines in (12, 3)]) is None
