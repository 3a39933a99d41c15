from collections.abc import Sequence

import pytest

from bitfleet.launch.reproduce.papers import PAPERS, dry_run_of
from bitfleet.launch.reproduce.recipe import Change
from bitfleet.launch.reproduce.standing import Standing
from bitfleet.launch.reproduce.verdict import Validation, Verdict, judge

PAPER = PAPERS["birealnet18"]  # 57.2 %
CHANGE = Change("epochs", 150, 3)


def verdict(*top1: float, num_steps: int = 30, changes: Sequence[Change] = (), dry: bool = False) -> Verdict:
    """Of a run with a validation every 10 steps."""
    validations = [Validation(10 * (i + 1), value, 80.0, 50_000) for i, value in enumerate(top1)]
    standing = Standing(3, top1[-1], 57.0, 3.0, "on track") if top1 else None
    return judge(dry_run_of(PAPER) if dry else PAPER, validations, num_steps, changes, standing)


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (57.2, "reproduced"),
        (56.7, "reproduced"),
        (57.7, "reproduced"),
        (56.69, "not reproduced"),
        (56.6, "not reproduced"),  # Bop's number must not pass
        (57.71, "higher than published"),
    ],
)
def test_end_within_the_tolerance(last: float, kind: str) -> None:
    found = verdict(10.0, 57.2, last)
    assert found.kind == kind
    assert f"top-1 {last:.2f} %, published 57.2 %: {last - 57.2:+.2f} points, tolerance 0.5" in found.sentence
    assert found.disagrees == (kind == "not reproduced")


@pytest.mark.parametrize("name", PAPERS)
def test_what_the_paper_improves_on_does_not_pass(name: str) -> None:
    bop = PAPERS[name].neighbours[0]
    assert bop.name.startswith("Bop")
    assert bop.top1 < PAPERS[name].top1 - PAPERS[name].tolerance


def test_the_last_validation_counts_and_not_the_best() -> None:
    assert verdict(10.0, 57.2, 50.0).kind == "not reproduced"


def test_without_a_validation_at_the_end_there_is_no_verdict() -> None:
    assert verdict(10.0, 57.2) == (
        "unfinished",
        "the last validation is after step 20 of 30: the same command continues the run",
    )
    assert verdict().sentence.startswith("no validation yet")
    assert not verdict().disagrees
    assert verdict(dry=True).kind == "unfinished"


def test_changed_recipe_is_no_reproduction_however_good() -> None:
    found = verdict(10.0, 20.0, 57.2, changes=[CHANGE])
    assert found.kind == "not a reproduction"
    assert found.disagrees
    assert found.sentence == (
        "top-1 57.20 %, published 57.2 %: +0.00 points; 1 setting changed: epochs is 3, in the recipe 150"
    )
    assert "4 settings changed" in verdict(1.0, 2.0, 3.0, changes=[CHANGE] * 4).sentence
    assert "1 setting changed" in verdict(1.0, changes=[CHANGE]).sentence


def test_dry_run_says_how_it_stands_and_no_more() -> None:
    found = verdict(10.0, 20.0, 57.0, dry=True, changes=[CHANGE])
    assert found.kind == "dry run"
    assert "on track: expected 57.00 +- 3.0; it says nothing about the paper" in found.sentence
    assert not found.disagrees
