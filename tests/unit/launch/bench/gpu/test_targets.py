"""The targets of `bitfleet bench gpu`: each can be met and missed, and the docs have them."""

import re
from typing import Any

import pytest

from bitfleet.launch.bench.gpu.command import PARTS
from bitfleet.launch.bench.gpu.targets import BINARYNET_STEP, ON_BITS, TARGETS, Target, format_targets
from bitfleet.launch.bench.results import Row
from tests.conftest import REPOSITORY

COMPILED = {"batch_size": 256, "precision": "bf16", "is_compiled": True, "deterministic": False}
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("rule", "tests", {"failed": 0}),
    ("gradients", "tests", {"failed": 0}),
    ("repeat", "tests", {"failed": 0}),
    ("waits", "tests", {"failed": 0}),
    ("update", ON_BITS, {"numel": 62_000_000, "of_copy_bandwidth": 0.8}),
    ("update", ON_BITS, {"numel": 62_000_000, "time_to_adamw": 0.75}),
    ("networks", "birealnet18", {"of_resnet18": 0.9, **COMPILED}),
    ("networks", "xnornet", {"of_resnet18": 1.8, **COMPILED}),
    ("trainer", "step", {"run": BINARYNET_STEP, "ms": 1.2}),
    ("pixels", "tests", {"failed": 0}),
]
"""A result that meets each target by a hair, in the order of the targets."""
OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("probe", "tests", {"failed": 1}),
    ("update", ON_BITS, {"numel": 12_000_000, "of_copy_bandwidth": 0.1, "time_to_adamw": 2.0}),
    ("networks", "birealnet18", {"of_resnet18": 0.1, **COMPILED, "is_compiled": False}),
    ("trainer", "step", {"run": "loader torch", "ms": 100.0}),
]
"""Results that no target is about."""


def as_rows(results: list[tuple[str, str, dict[str, Any]]]) -> list[Row]:
    return [{"part": part, "what": what, **figures} for part, what, figures in results]


def verdicts(rows: list[Row]) -> list[str]:
    """One per target: met, NOT MET or not measured."""
    lines = format_targets(rows).splitlines()[2 : 2 + len(TARGETS)]
    return [next(word for word in ("NOT MET", "not measured", "met") if line.endswith(word)) for line in lines]


def test_targets_are_met_or_not_measured() -> None:
    assert verdicts(as_rows(ROWS + OTHERS)) == ["met"] * len(TARGETS)
    assert verdicts(as_rows(OTHERS)) == ["not measured"] * len(TARGETS)


@pytest.mark.parametrize("index", range(len(TARGETS)))
def test_each_target_can_be_missed(index: int) -> None:
    part, what, figures = ROWS[index]
    target: Target = list(TARGETS.values())[index]
    worse = figures[target.figure] + (-0.01 if target.goal.startswith("at least") else 1)
    rows = as_rows([*ROWS, (part, what, figures | {target.figure: worse})])
    expected = ["met"] * len(TARGETS)
    expected[index] = "NOT MET"
    assert verdicts(rows) == expected


def test_errors_are_counted() -> None:
    assert "errors" not in format_targets(as_rows(ROWS))
    assert "1 errors" in format_targets([{"part": "p", "what": "w", "error": "E: no", "where": ""}])


def test_docs_have_a_line_for_each_target() -> None:
    lines = (REPOSITORY / "docs" / "gpu.md").read_text().splitlines()
    for title, target in TARGETS.items():
        assert sum(line.startswith(f"| {title} | {target.goal} |") for line in lines) == 1, title


def test_docs_name_each_part() -> None:
    text = (REPOSITORY / "docs" / "gpu.md").read_text()
    assert [name for name in PARTS if not re.search(rf"\b{name}\b", text)] == []
