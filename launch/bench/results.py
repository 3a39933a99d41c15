"""Results of the benchmarks: rows of figures, their tables, and the JSON lines of `bench gpu`.

A row names in "what" the thing that was measured; its other entries are figures. A row of `bench
gpu` also has its "part", and instead of figures it may have an "error" (with "where") or "skipped",
a reason.
"""

import contextlib
import gc
import itertools
import json
import statistics
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfleet.launch.bench.timing import ratios
from bitfleet.launch.text import table

Row = dict[str, Any]
SHOWN_ERROR, SHOWN_TRACEBACK = 300, 1500


def spread(values: Sequence[float]) -> str:
    """Format the median with the quartiles: "2.1 (1.9 - 2.4)"."""
    low, median, high = map(_format_value, np.quantile(values, (0.25, 0.5, 0.75)))
    return f"{median} ({low} - {high})"


def compare(what: str, series: Mapping[str, Sequence[float]]) -> Row:
    """Return the medians of two series, and the first over the second round by round."""
    medians = {name: statistics.median(values) for name, values in series.items()}
    return {"what": what, **medians, "ratio": spread(ratios(*series.values()))}


def titled(title: str, rows: Sequence[Row]) -> str:
    """Return the rows as a table, indented below its title."""
    return f"{title}\n{format_rows(rows)}"


def format_rows(rows: Sequence[Row]) -> str:
    """Return the results as tables for a terminal; neighbours with the same figures share one."""
    blocks: list[str] = []
    for names, group in itertools.groupby(rows, _names):
        if names:
            cells = [[row["what"], *(_format_value(row[name]) for name in names)] for row in group]
            blocks.append(table([["", *names], *cells]))
        else:
            blocks += map(_format_failure, group)
    return textwrap.indent("\n".join(blocks), "  ")


def _names(row: Row) -> list[str]:
    """Return the names of a row's figures; none for an error or a skip, which are sentences."""
    return [] if {"error", "skipped"} & row.keys() else [name for name in row if name not in ("part", "what")]


def _format_failure(row: Row) -> str:
    text = f"ERROR {' '.join(row['error'].split())[:SHOWN_ERROR]}" if "error" in row else f"skipped, {row['skipped']}"
    return f"{row['what']}: {text}"


def _format_value(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case int():
            return f"{value:,}"
    return "-" if value is None else str(value)


def append_row(path: Path, part: str, what: str, **figures: Any) -> None:
    """Append one result to the file at `path`; several processes may take turns."""
    with path.open("a") as file:
        file.write(json.dumps({"part": part, "what": what, **figures}, default=str) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Return the results in the file at `path`, without a last line that was cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


@dataclass(frozen=True)
class Session:
    """One part of `bench gpu`, in its own process."""

    part: str
    output: str
    """File of the results."""
    deadline: float
    """time.monotonic(), which processes share, by which the part must be done."""
    tiny: bool = False
    """Sizes of a dry run: every line of code runs, no figure means anything."""
    cifar: str | None = None
    """Class folders of CIFAR-10."""
    imagenet: str | None = None
    """Data set of photos."""

    @property
    def device(self) -> torch.device:
        """The first GPU, or in a dry run without one the CPU."""
        return torch.device("cuda", 0) if self.is_cuda else torch.device("cpu")

    @property
    def is_cuda(self) -> bool:
        """True if the device is a GPU."""
        return torch.cuda.is_available()

    def seconds_left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, what: str, **figures: Any) -> None:
        """Write one result."""
        append_row(Path(self.output), self.part, what, **figures)

    def attempt(self, what: str, run: Callable[..., object], *arguments: Any, needs_seconds: float = 0.0) -> None:
        """Call `run(*arguments)`; a failure, or too little time, is a result.

        Raises:
            Exception: the GPU's context is broken, so that nothing more can run in this process.
        """
        if self.seconds_left() < needs_seconds and not self.tiny:
            self.add(what, skipped=f"{needs_seconds:.0f} s needed, {max(self.seconds_left(), 0):.0f} s left")
            return
        try:
            run(*arguments)
        except Exception as error:
            where = traceback.format_exc()[-SHOWN_TRACEBACK:]
            self.add(what, error=f"{type(error).__name__}: {error}", where=where)
            if "CUDA error" in str(error):
                raise
        finally:
            gc.collect()
            if self.is_cuda:
                with contextlib.suppress(RuntimeError):  # a consequence of a CUDA error, which it must not hide
                    torch.cuda.empty_cache()
