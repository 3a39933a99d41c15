"""The results of `bitfleet bench gpu`: one JSON line each, written at once, so that a run that is cut off loses nothing.

A line has `part` and `what`, then its facts; instead of facts `error` (with `where`) for what failed, `skipped` (a reason) for
what was not tried. Nothing heavy is imported here: the process that starts the parts never touches the GPU.
"""

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SHOWN_ERROR = 300  # characters
WIDTH = 160  # of a table
PROSE_WIDTH = 130


def append_row(path: Path, part: str, what: str, **facts: Any) -> None:
    """Append one result to the file at `path`, which several processes may do in turns."""
    line = json.dumps({"part": part, "what": what, **facts}, default=str)
    with path.open("a") as file:
        file.write(line + "\n")


def read_rows(path: Path) -> list[Row]:
    """The results in the file at `path`; a last line that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """The results as tables for a terminal: neighbours with the same facts share one."""
    lines: list[str] = []
    block: list[Row] = []
    for row in rows:
        if block and (_names(row) != _names(block[0]) or not _names(row)):
            lines += _format_block(block)
            block = []
        block.append(row)
    return "\n".join(lines + (_format_block(block) if block else []))


def _names(row: Row) -> list[str]:
    """The facts of a row; none for an error or for what was skipped, which are sentences."""
    if "error" in row or "skipped" in row:
        return []
    return [name for name in row if name not in ("part", "what")]


def _format_block(rows: Sequence[Row]) -> list[str]:
    names = _names(rows[0])
    if "error" in rows[0]:
        return [f"  {rows[0]['what']}: ERROR {' '.join(rows[0]['error'].split())[:SHOWN_ERROR]}"]
    if "skipped" in rows[0]:
        return [f"  {rows[0]['what']}: skipped, {rows[0]['skipped']}"]
    cells = [["", *names], *([row["what"], *(_format_value(row[name]) for name in names)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if sum(widths) + 2 * len(widths) > WIDTH:
        return [line for row in rows for line in _format_long(row, names)]
    return [_format_line(line, widths) for line in cells]


def _format_long(row: Row, names: Sequence[str]) -> list[str]:
    """A row that is too wide for a table: one fact below the other."""
    lines = [f"  {row['what']}"]
    for name in names:
        lines += textwrap.wrap(
            f"{name}: {_format_value(row[name])}", PROSE_WIDTH, initial_indent="    ", subsequent_indent="      "
        )
    return lines


def _format_line(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  " + "  ".join([first.strip().ljust(widths[0]), *rest])


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_format_value(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_format_value, value)) or "none"
    return "-" if value is None else str(value)
