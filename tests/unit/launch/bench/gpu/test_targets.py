"""The targets of `bitfleet bench gpu`: each can be met and missed, and the docs have them."""

import re
from typing import Any

import pytest

from bitfleet.launch.bench.gpu.command import PARTS
from bitfleet.launch.bench.gpu.session import Row
from bitfleet.launch.bench.gpu.targets import BINARYNET_STEP, ON_BITS, TARGETS, format_targets
from tests.conftest import REPOSITORY


def good_rows() -> list[Row]:
    """Results that meet every target by a hair."""

    def row(part: str, what: str, **facts: Any) -> Row:
        return {"part": part, "what": what, **facts}

    compiled = {"batch_size": 256, "precision": "bf16", "is_compiled": True, "deterministic": False}
    return [
        row("rule", "recorded trajectory", steps_with_other_flips=0, first_difference={}),
        row("rule", "recorded trajectory", steps_with_other_flips=None, first_difference={}),
        row("rule", "wild gradients", first_difference={}),
        row("repeat", "birealnet18", deterministic=False, different_gradients=7),
        row("repeat", "birealnet18", deterministic=True, different_gradients=0),
        row("update", ON_BITS, numel=62_000_000, of_copy_bandwidth=0.8, time_to_adamw=0.75),
        row("update", ON_BITS, numel=12_000_000, of_copy_bandwidth=0.1, time_to_adamw=2.0),
        row("networks", "resnet18", images_per_second=1000.0, **compiled),
        row("networks", "birealnet18", images_per_second=900.0, **compiled),
        row("networks", "birealnet18", images_per_second=10.0, **(compiled | {"is_compiled": False})),
        row("networks", "xnornet", images_per_second=1800.0, **compiled),
        row("trainer", "host syncs per step", run="fashion_quickstart, loader torch", total=2.0),
        row("trainer", "host syncs per step", run="fashion_quickstart, loader memory", total=0.0),
        row("trainer", "step", run=BINARYNET_STEP, ms=1.2),
        row("dali", "pixels, GPU against CPU", preprocessing="torchvision", mean=1.0),
        row("dali", "pixels, GPU against CPU", preprocessing="official", mean=2.0),
        row("dali", "races under load", different_batches=0),
    ]


BAD: dict[int, tuple[int, dict[str, Any]]] = {  # target -> the row of good_rows that is made worse, and how
    0: (0, {"steps_with_other_flips": 1}),
    1: (2, {"first_difference": {"exp_avg": 3}}),
    2: (4, {"different_gradients": 1}),
    3: (12, {"total": 0.1}),
    4: (5, {"of_copy_bandwidth": 0.79}),
    5: (5, {"time_to_adamw": 0.76}),
    6: (8, {"images_per_second": 899.0}),
    7: (10, {"images_per_second": 1799.0}),
    8: (13, {"ms": 1.21}),
    9: (14, {"mean": 1.1}),
    10: (15, {"mean": 2.1}),
    11: (16, {"different_batches": 1}),
}


def verdicts(rows: list[Row]) -> list[str]:
    """One a target: met, NOT MET or not measured."""
    lines = format_targets(rows).splitlines()[2 : 2 + len(TARGETS)]
    return [next(word for word in ("NOT MET", "not measured", "met") if line.endswith(word)) for line in lines]


def test_targets_are_met_or_not_measured() -> None:
    assert verdicts(good_rows()) == ["met"] * len(TARGETS)
    assert verdicts([]) == ["not measured"] * len(TARGETS)


@pytest.mark.parametrize("target", range(len(TARGETS)))
def test_each_target_can_be_missed(target: int) -> None:
    rows = good_rows()
    number, change = BAD[target]
    rows[number] |= change
    expected = ["met"] * len(TARGETS)
    expected[target] = "NOT MET"
    assert verdicts(rows) == expected


def test_bits_that_differ_are_no_met_target() -> None:
    rows = good_rows()
    rows[1]["first_difference"] = {"weights": 20}  # with bf16 gradients, for which no flips are recorded
    assert verdicts(rows)[0] == "NOT MET"


def test_errors_are_counted() -> None:
    assert "errors" not in format_targets(good_rows())
    assert "1 errors" in format_targets([{"part": "p", "what": "w", "error": "E: no", "where": ""}])


def test_docs_have_a_line_for_each_target() -> None:
    lines = (REPOSITORY / "docs" / "gpu.md").read_text().splitlines()
    for target in TARGETS:
        assert sum(line.startswith(f"| {target.title} | {target.goal} |") for line in lines) == 1, target.title


def test_docs_name_each_part() -> None:
    text = (REPOSITORY / "docs" / "gpu.md").read_text()
    assert [name for name in PARTS if not re.search(rf"\b{name}\b", text)] == []
