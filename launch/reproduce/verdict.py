"""The verdict on a run of the paper."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from bitfleet.launch.reproduce.papers import Paper
from bitfleet.launch.reproduce.recipe import Change
from bitfleet.launch.reproduce.standing import Standing

Kind = Literal["reproduced", "higher than published", "not reproduced", "not a reproduction", "unfinished", "dry run"]
ROUNDING = 1e-9


class Validation(NamedTuple):
    """Of one epoch; accuracies in percent."""

    step: int
    top1: float
    top5: float
    num_images: int


class Verdict(NamedTuple):
    """What a run showed."""

    kind: Kind
    sentence: str

    @property
    def disagrees(self) -> bool:
        """Whether a finished run did not do what was wanted of it."""
        return self.kind in ("not reproduced", "not a reproduction")


def judge(
    paper: Paper,
    validations: Sequence[Validation],
    num_steps: int,
    changes: Sequence[Change],
    standing: Standing | None,
) -> Verdict:
    """Say whether a run reproduced `paper`.

    Args:
        paper: what was to be reproduced.
        validations: of the run, by step.
        num_steps: of the whole run. Only a validation after the last of them counts.
        changes: of the recipe.
        standing: of the last validation.
    """
    last = validations[-1] if validations else None
    if last is None or last.step < num_steps:
        reached = f"the last validation is after step {last.step:,} of {num_steps:,}" if last else "no validation yet"
        return Verdict("unfinished", f"{reached}: the same command continues the run{_changed(changes)}")
    if paper.is_dry:
        return Verdict(
            "dry run", f"top-1 {last.top1:.2f} %{_stood(standing)}; it says nothing about the paper{_changed(changes)}"
        )
    difference = last.top1 - paper.top1
    numbers = f"top-1 {last.top1:.2f} %, published {paper.top1:.1f} %: {difference:+.2f} points"
    if changes:
        return Verdict("not a reproduction", f"{numbers}{_changed(changes)}")
    allowed = f"{numbers}, tolerance {paper.tolerance:g}"
    if difference < -paper.tolerance - ROUNDING:
        return Verdict("not reproduced", allowed)
    if difference > paper.tolerance + ROUNDING:
        return Verdict("higher than published", f"{allowed}: before it is believed, look for what differs")
    return Verdict("reproduced", allowed)


def _changed(changes: Sequence[Change]) -> str:
    if not changes:
        return ""
    shown = "; ".join(str(change) for change in changes[:3]) + (" ..." if len(changes) > 3 else "")
    return f"; {len(changes)} setting{'s' * (len(changes) > 1)} changed: {shown}"


def _stood(standing: Standing | None) -> str:
    if standing is None or standing.expected is None or standing.tolerance is None:
        return ""
    return f", {standing.word}: expected {standing.expected:.2f} +- {standing.tolerance:.1f}"
