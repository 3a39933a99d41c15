"""Make a report of the sweeps and runs at some paths."""

import re
from collections.abc import Sequence
from pathlib import Path

from bitfleet.launch.report.page import Section, write_page
from bitfleet.launch.report.run_comparison import NAME, compare
from bitfleet.launch.report.run_results import RunResults, read_run
from bitfleet.launch.report.run_section import run_section
from bitfleet.launch.report.sweep_results import (
    SweepResults,
    belong_together,
    check_has_results,
    join,
    read_sweep,
)
from bitfleet.launch.report.sweep_section import sweep_section
from bitfleet.launch.sweep.table import CSV
from bitfleet.trainer.metrics import JSONL
from bitfleet.trainer.run.folder import CONFIG

Part = tuple[list[Path], SweepResults | RunResults]
"""Paths, and what they hold together."""


def write_report(paths: Sequence[Path], output: Path | None = None) -> tuple[Path, list[str]]:
    """Write one page about sweeps and runs; return its path, and one line with the answer of each
    section.

    Args:
        paths: sweep folders, sweep.csv files and run folders, in any mixture. Parts of one sweep
            with different seeds are joined; several runs are compared first.
        output: folder of report.html and report/*.png. None: the folder of the only path.

    Raises:
        ValueError: a path is neither a sweep nor a run, has nothing to report or is given twice, or
            the folder cannot be written.
    """
    if not paths:
        raise ValueError("report on what? Pass sweep folders, CSV files of sweeps or run folders")
    places = [path.resolve() for path in paths]
    if twice := [path for number, path in enumerate(paths) if places[number] in places[:number]]:
        raise ValueError(f"{twice[0]} is given twice, and a run counts once: pass each sweep and run once")
    if output is None:
        if len(paths) > 1:
            raise ValueError(f"where to? A report on {len(paths)} paths needs --output FOLDER")
        output = paths[0] if paths[0].is_dir() else paths[0].parent
    parts = _joined([([path], _read(path)) for path in paths])
    sections: list[Section] = []
    lines: list[str] = []
    if comparison := compare([results for _, results in parts if isinstance(results, RunResults)]):
        sections.append(comparison)
        lines.append(f"{comparison.title}: {' '.join(comparison.answer)}")
    keys = [NAME]
    for sources, results in parts:
        keys.append(_key(results, sources[0], keys))
        key = keys[-1]
        sections.append(sweep_section(results, key) if isinstance(results, SweepResults) else run_section(results, key))
        lines.append(f"{', '.join(map(str, sources))}: {' '.join(sections[-1].answer)}")
    title = sections[0].title if len(parts) == 1 else f"{len(parts)} sweeps and runs"
    return write_page(title, sections, output), lines


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Return `parts` with those of one sweep joined, in the place of the first of them.

    Raises:
        ValueError: a sweep has no finished run.
    """
    kept: list[Part] = []
    for paths, new in parts:
        for number, (earlier_paths, earlier) in enumerate(kept):
            if isinstance(new, SweepResults) and isinstance(earlier, SweepResults) and belong_together(earlier, new):
                kept[number] = [*earlier_paths, *paths], join(earlier, new)
                break
        else:
            kept.append((paths, new))
    for _, results in kept:
        if isinstance(results, SweepResults):
            check_has_results(results)
    return kept


def _read(path: Path) -> SweepResults | RunResults:
    if not path.exists():
        raise ValueError(f"there is nothing at {path}: expected a sweep folder, a CSV file of a sweep or a run folder")
    if path.is_file() or (path / CSV).is_file():
        return read_sweep(path)
    if (path / CONFIG).is_file() or (path / JSONL).is_file():
        return read_run(path)
    raise ValueError(
        f"{path} is neither a sweep (there is no {CSV} in it) nor a run (there is no {CONFIG}): pass the folder of one"
    )


def _key(results: SweepResults | RunResults, path: Path, taken: Sequence[str]) -> str:
    name = results.name if isinstance(results, SweepResults) else path.resolve().name
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "part"
    return slug if slug not in taken else f"{slug}-{len(taken) + 1}"
