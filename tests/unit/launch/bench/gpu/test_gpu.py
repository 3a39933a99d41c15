"""The parts of `bitfleet bench gpu` that are not measurements: results, tables, targets, and what an error becomes."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfleet.launch.bench.gpu.cifar import draw_accuracy
from bitfleet.launch.bench.gpu.command import PARTS
from bitfleet.launch.bench.gpu.rows import Row, append_row, format_rows, read_rows
from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.gpu.targets import BINARYNET_STEP, ON_BITS, TARGETS, format_targets
from bitfleet.launch.bench.gpu.trainer import VARIANTS, variants_of
from tests.conftest import REPOSITORY


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("rule", torch.device("cpu"), tmp_path / "out.jsonl", time.monotonic() + 100, tiny=True)


def test_rows_survive_a_cut_off_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert read_rows(path) == []
    append_row(path, "rule", "first", count=3)
    append_row(path, "rule", "second", ratio=0.5)
    with path.open("a") as file:
        file.write('{"part": "rule", "what": "thi')
    assert read_rows(path) == [
        {"part": "rule", "what": "first", "count": 3},
        {"part": "rule", "what": "second", "ratio": 0.5},
    ]


def test_rows_with_the_same_facts_share_a_table() -> None:
    rows: list[Row] = [
        {"part": "p", "what": "a", "count": 12345, "ratio": 0.123456, "equal": True},
        {"part": "p", "what": "longer", "count": 1, "ratio": 2.0, "equal": False},
        {"part": "p", "what": "broken", "error": "RuntimeError: no\nluck", "where": "trace"},
        {"part": "p", "what": "later", "skipped": "60 s needed, 3 s left"},
        {"part": "p", "what": "places", "total": None, "places": {"x.py:1": 2.0}, "names": []},
    ]
    assert [line.split() for line in format_rows(rows).splitlines()] == [
        ["count", "ratio", "equal"],
        ["a", "12,345", "0.1235", "yes"],
        ["longer", "1", "2", "no"],
        "broken: ERROR RuntimeError: no luck".split(),
        "later: skipped, 60 s needed, 3 s left".split(),
        ["total", "places", "names"],
        ["places", "-", "x.py:1", "2", "none"],
    ]


def test_wide_rows_are_written_one_fact_below_the_other() -> None:
    text = format_rows([{"part": "p", "what": "packages", "versions": {f"package{i}": "1.0" for i in range(20)}}])
    assert text.splitlines()[0] == "  packages"
    assert text.splitlines()[1].startswith("    versions: package0 1.0, package1 1.0")
    assert max(map(len, text.splitlines())) <= 130


def test_an_error_is_a_result(session: Session) -> None:
    assert session.attempt("sum", lambda a, b: a + b, 2, 3) == 5

    def fail() -> None:
        raise ValueError("no such thing")

    assert session.attempt("failing", fail) is None
    (row,) = read_rows(session.output)
    assert (row["part"], row["what"], row["error"]) == ("rule", "failing", "ValueError: no such thing")
    assert "in fail" in row["where"]


def test_a_broken_context_ends_the_part(session: Session) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        session.attempt("failing", fail)
    assert "illegal memory access" in read_rows(session.output)[0]["error"]


def test_what_no_longer_fits_is_skipped(session: Session) -> None:
    called: list[int] = []
    session.attempt("long", called.append, 1, needs_seconds=200)
    assert not called
    (row,) = read_rows(session.output)
    assert row["what"] == "long"
    assert row["skipped"].startswith("200 s needed, ")


def test_a_cpu_has_no_graph() -> None:
    assert not any(variant.cuda_graph for variant in variants_of(torch.device("cpu")))
    assert list(variants_of(torch.device("cuda", 0))) == list(VARIANTS)


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


def test_accuracy_is_drawn(tmp_path: Path) -> None:
    rows: list[Row] = [{"epoch": epoch, "of": 3, "top1": epoch / 10} for epoch in (1, 2, 3)]
    draw_accuracy(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_docs_have_a_line_for_each_target() -> None:
    lines = (REPOSITORY / "docs" / "gpu.md").read_text().splitlines()
    for target in TARGETS:
        assert sum(line.startswith(f"| {target.title} | {target.goal()} |") for line in lines) == 1, target.title


def test_docs_name_each_part() -> None:
    text = (REPOSITORY / "docs" / "gpu.md").read_text()
    assert [name for name in PARTS if f"\n| {name} | " not in text] == []
