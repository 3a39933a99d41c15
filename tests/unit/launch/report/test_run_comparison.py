"""Several runs on one page: one table, and an answer in which seeds of one setting count
together."""

from pathlib import Path

from bitfleet.launch.report import write_report
from bitfleet.launch.report.page import Section, Table
from bitfleet.launch.report.run_comparison import compare
from bitfleet.launch.report.run_results import RunResults, read_run
from tests.unit.launch.report import synthetic


def compared(runs: list[RunResults]) -> tuple[Section, Table]:
    section = compare(runs)
    assert section is not None
    (block,) = section.blocks
    assert block.table is not None
    return section, block.table


def test_seeds_are_one_point_and_settings_are_named(tmp_path: Path) -> None:
    runs = [
        synthetic.run_folder(tmp_path / f"{rule}{seed}", seed=seed, rule=rule, more=more + 0.01 * seed)
        for rule, more in (("bop", 0.0), ("bop2ndorder", 0.1))
        for seed in range(2)
    ]
    page, (line, *others) = write_report(runs, tmp_path / "report")
    assert line.startswith("4 runs compared: Best: rule bop2ndorder with 80.5 ± 0.7 % top-1")
    assert "Next: rule bop with 70.5 ± 0.7 %" in line
    assert len(others) == 4
    assert not list((tmp_path / "report" / "report").glob("runs-compared*"))  # a table, no pictures
    assert page.read_text().index("4 runs compared") < page.read_text().index("synthetic</h2>")


def test_table_has_every_setting_that_differs_and_the_answer_those_of_every_run(tmp_path: Path) -> None:
    runs = [read_run(synthetic.run_folder(tmp_path / rule, rule=rule)) for rule in ("bop", "bnew")]
    for run, size in zip(runs, (64, 128), strict=True):
        run.facts["config"]["data"]["image_size"] = size
    runs[1].facts["config"]["optim"]["rho"] = 1e-3  # which Bop does not have
    section, table = compared(runs)
    assert table.header == ("run", "seed", "top-1", "top-5", "data.image_size", "rule", "rho")
    assert [row[1:] for row in table.rows] == [
        ("0", "70.00 %", "85.00 %", "64", "bop", "-"),
        ("0", "70.00 %", "85.00 %", "128", "bnew", "0.001"),
    ]
    assert "Next: data.image_size 128, rule bnew with" in section.answer[1]


def test_settings_that_one_rule_alone_has_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    rules = ("bop", "bop", "bnew", "bnew")
    runs = [
        read_run(synthetic.run_folder(tmp_path / str(number), rule=rule, seed=number % 3, more=0.1 * (number == 1)))
        for number, rule in enumerate(rules)
    ]
    for run, gamma in zip(runs, (1e-4, 1e-3, None, None), strict=True):
        run.facts["config"]["optim"]["gamma"] = gamma and {"start": gamma, "end": gamma / 10, "kind": "polynomial"}
    section, table = compared(runs)
    assert table.header[4:] == ("rule", "gamma", "gamma.end", "gamma.kind")
    assert section.answer[0] == "Best: rule bop, gamma 0.001 with 80.0 % top-1 (one seed)."
    assert section.answer[2] == "3 points were tried."  # the two runs of bnew are one


def test_a_run_that_has_not_ended_says_its_progress(tmp_path: Path) -> None:
    runs = [read_run(synthetic.run_folder(tmp_path / str(lines), lines)) for lines in (12, 8)]
    section, table = compared(runs)
    assert [row[-1] for row in table.rows] == ["-", "after 2.0 of 3 epochs"]
    assert table.strong == {0}
    assert "progress after 2.0 of 3 epochs" in " ".join(section.answer)


def test_runs_that_differ_in_the_seed_alone(tmp_path: Path) -> None:
    runs = [read_run(synthetic.run_folder(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    section, table = compared(runs)
    assert section.blocks[0].text
    assert table.header == ("run", "seed", "top-1", "top-5")


def test_replicas_are_those_that_a_run_had(tmp_path: Path) -> None:
    """Unset in both, they are the ranks that each was started on."""
    runs = [read_run(synthetic.run_folder(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    for run, number in zip(runs, (1, 4), strict=True):
        run.facts["config"]["num_replicas"] = None
        run.facts["num_replicas"] = number  # type: ignore[index]
    _, table = compared(runs)
    assert table.header == ("run", "seed", "top-1", "top-5", "num_replicas")
    assert [row[-1] for row in table.rows] == ["1", "4"]


def test_runs_without_a_validation_have_no_answer(tmp_path: Path) -> None:
    runs = [read_run(synthetic.run_folder(tmp_path / str(lines), lines)) for lines in (12, 3)]
    section, table = compared(runs)
    assert section.answer == ()
    assert table.rows[1][2:4] == ("-", "-")
    assert compare(runs[:1]) is None
