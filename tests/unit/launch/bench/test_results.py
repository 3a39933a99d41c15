"""Results of `bitfleet bench gpu`, their tables, and errors as results."""

import time
from pathlib import Path

import pytest

from bitfleet.launch.bench.results import Row, Session, append_row, compare, format_rows, read_rows, spread, titled


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("rule", str(tmp_path / "out.jsonl"), time.monotonic() + 100)


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
        {"part": "p", "what": "places", "total": None, "name": "x"},
    ]
    assert [line.split() for line in format_rows(rows).splitlines()] == [
        ["count", "ratio", "equal"],
        ["a", "12,345", "0.1235", "yes"],
        ["longer", "1", "2", "no"],
        "broken: ERROR RuntimeError: no luck".split(),
        "later: skipped, 60 s needed, 3 s left".split(),
        ["total", "name"],
        ["places", "-", "x"],
    ]


def test_an_error_is_a_result(session: Session) -> None:
    sums: list[int] = []
    session.attempt("sum", lambda a, b: sums.append(a + b), 2, 3)
    assert sums == [5]

    def fail() -> None:
        raise ValueError("no such thing")

    session.attempt("failing", fail)
    (row,) = read_rows(Path(session.output))
    assert (row["part"], row["what"], row["error"]) == ("rule", "failing", "ValueError: no such thing")
    assert "in fail" in row["where"]


def test_a_broken_context_ends_the_part(session: Session) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        session.attempt("failing", fail)
    assert "illegal memory access" in read_rows(Path(session.output))[0]["error"]


def test_what_no_longer_fits_is_skipped(session: Session) -> None:
    called: list[int] = []
    session.attempt("long", called.append, 1, needs_seconds=200)
    assert not called
    (row,) = read_rows(Path(session.output))
    assert row["what"] == "long"
    assert row["skipped"].startswith("200 s needed, ")


def test_a_table_stands_below_its_title() -> None:
    rows: list[Row] = [{"what": "a", "ms": 1.5, "images/s": spread([800.0, 1000.0, 900.0])}]
    assert titled("title", rows).split("\n") == ["title", "      ms         images/s", "  a  1.5  900 (850 - 950)"]


def test_two_series_are_compared_round_by_round() -> None:
    row = compare("ms", {"with": [110.0, 240.0, 400.0], "without": [100.0, 200.0, 400.0]})
    assert row == {"what": "ms", "with": 240.0, "without": 200.0, "ratio": "1.1 (1.05 - 1.15)"}
    assert compare("ms", {"with": [110.0], "without": [100.0]})["ratio"] == "1.1 (1.1 - 1.1)"
