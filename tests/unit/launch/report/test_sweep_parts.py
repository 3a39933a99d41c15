"""Parts of a sweep, run with other seeds in other places."""

from pathlib import Path
from typing import Any

import pytest

from bitfleet.launch.report import write_report
from bitfleet.launch.report.sweep_results import FURTHER, SweepResults, belong_together, join, read_sweep
from tests.unit.launch.report import synthetic

FACTS: dict[str, Any] = {
    "name": "rules",
    "axes": {"rule": ["a", "b"]},
    "git": "abc",
    "options": ["--epochs", "2"],
    "config": {"epochs": 2, "seed": 0, "device": "cpu", "run_dir": "x", "data": {"root": "here", "image_size": 32}},
}


def part(folder: Path, *seeds: int, top1: float = 0.5, axis: str = "rule", **facts: object) -> SweepResults:
    rows = [synthetic.row({axis: name}, seed, top1 + 0.1 * (name == "b")) for name in "ab" for seed in seeds]
    return read_sweep(synthetic.write(folder, [axis], rows, **FACTS | {"seeds": seeds} | facts))


def test_seeds_of_several_places_become_one_sweep(tmp_path: Path) -> None:
    elsewhere = FACTS["config"] | {
        "seed": 2,
        "device": "gpu",
        "run_dir": "y",
        "data": {"root": "there", "image_size": 32},
    }
    one, other = part(tmp_path / "1", 0, 1), part(tmp_path / "2", 2, top1=0.8, git="def", config=elsewhere)
    third = part(tmp_path / "3", 3)
    assert belong_together(one, other)
    whole = join(join(one, other), third)
    assert [point.labels for point in whole.points] == [(("rule", "a"),), (("rule", "b"),)]
    assert [[run.seed for run in point.finished] for point in whole.points] == [["0", "1", "2", "3"]] * 2
    assert whole.ranked[0].top1 is not None
    assert whole.ranked[0].top1.mean == pytest.approx((0.6 + 0.6 + 0.9 + 0.6) / 4)
    assert (whole.facts["seeds"], whole.facts["git"]) == ([0, 1, 2, 3], ["abc", "def"])
    assert whole.facts[FURTHER] == [str(each.path) for each in (other, third)]

    page, lines = write_report([one.path, tmp_path / "2"], tmp_path / "page")
    (line,) = lines
    assert line.startswith(f"{one.path}, {tmp_path / '2'}: Best: b with ")
    assert str(other.path) in page.read_text()
    assert "image_size" not in page.read_text()  # the whole configuration is sweep.json's


def test_a_part_without_a_finished_run_belongs_to_the_rest(tmp_path: Path) -> None:
    part(tmp_path / "1", 0)
    rows = [synthetic.row({"rule": name}, 1, 0.5) | {"status": "failed", "error": "killed"} for name in "ab"]
    synthetic.write(tmp_path / "2", ["rule"], rows, **FACTS | {"seeds": [1]})
    page, _ = write_report([tmp_path / "1", tmp_path / "2"], tmp_path / "page")
    assert "2 failed" in page.read_text()
    with pytest.raises(ValueError, match=r"2.sweep\.csv has finished \(2 of 2 failed\): .*killed"):
        write_report([tmp_path / "2"])


def test_a_field_that_one_part_is_too_old_to_have_may_have_its_default(tmp_path: Path) -> None:
    newer = part(tmp_path / "2", 1, config=FACTS["config"] | {"precise_bn_steps": None})
    assert belong_together(part(tmp_path / "1", 0), newer)
    other = part(tmp_path / "3", 1, config=FACTS["config"] | {"precise_bn_steps": 50})
    assert not belong_together(part(tmp_path / "1", 0), other)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"base": "xnornet_imagenet"},
        {"axes": {"rule": ["a", "b", "c"]}},
        {"axis": "norm"},
        {"config": FACTS["config"] | {"epochs": 3}},
        {"config": FACTS["config"] | {"data": {"root": "here", "image_size": 64}}},
    ],
)
def test_other_questions_and_settings_stay_apart(change: dict[str, Any], tmp_path: Path) -> None:
    assert not belong_together(part(tmp_path / "1", 0), part(tmp_path / "2", 1, **change))


def test_the_same_runs_made_twice_are_compared_and_not_joined(tmp_path: Path) -> None:
    assert not belong_together(part(tmp_path / "1", 0, 1), part(tmp_path / "2", 1, 2))


def test_where_one_does_not_tell_its_configuration_the_options_decide(tmp_path: Path) -> None:
    """A sweep.json of before had none."""
    one, old, other = (
        part(tmp_path / "1", 0),
        part(tmp_path / "2", 1),
        part(tmp_path / "3", 1, options=["--epochs", "3"]),
    )
    for each in (old, other):
        del each.facts["config"]  # type: ignore[attr-defined]
    assert belong_together(one, old)
    assert belong_together(old, one)
    assert not belong_together(one, other)
