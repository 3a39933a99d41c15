"""From paths of sweeps and runs to the report."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from bitfleet.launch.report.page import Section, write_page
from bitfleet.launch.report.run_comparison import NAME, compare, differences
from bitfleet.launch.report.run_results import RunResults, answer, read_run
from bitfleet.launch.report.run_section import run_section
from bitfleet.launch.report.sweep_findings import answer as answer_of_sweep
from bitfleet.launch.report.sweep_parts import belong_together, join
from bitfleet.launch.report.sweep_reader import CSV, read_sweep
from bitfleet.launch.report.sweep_results import SweepResults
from bitfleet.launch.report.sweep_section import sweep_section
from bitfleet.trainer.metrics import JSONL
from bitfleet.trainer.run.folder import CONFIG


def write_report(paths: Sequence[Path], output: Path | None = None) -> tuple[Path, list[str]]:
    """Turn sweeps and runs into one page.

    Args:
        paths: sweep folders, sweep.csv files, run folders, mixed at will; parts of one sweep, with other seeds, become one.
        output: folder of report.html and report/*.png. None: the folder of the only path.

    Returns:
        The page, and the answer of each section in a line. Several runs are compared first.

    Raises:
        ValueError: a path is neither a sweep nor a run, has nothing to report, or the folder cannot be written.
    """
    if not paths:
        raise ValueError("report on what? Pass sweep folders, CSV files of sweeps or run folders")
    if output is None:
        if len(paths) > 1:
            raise ValueError(f"where to? A report on {len(paths)} paths needs --output FOLDER")
        output = paths[0] if paths[0].is_dir() else paths[0].parent
    found = _joined([([path], _read(path)) for path in paths])
    keys = [NAME]
    sections: list[Section] = []
    lines: list[str] = []
    for parts, each in found:
        key = _key(each, parts[0], keys)
        keys.append(key)
        sections.append(sweep_section(each, key) if isinstance(each, SweepResults) else run_section(each, key))
        sentences = answer_of_sweep(each) if isinstance(each, SweepResults) else answer(each)
        lines.append(f"{', '.join(map(str, parts))}: {' '.join(sentences)}")
    runs = [each for _, each in found if isinstance(each, RunResults)]
    if (together := compare(runs)) is not None:
        section = sweep_section(together, NAME)
        sections.insert(0, dataclasses.replace(section, blocks=(*section.blocks, differences(runs))))
        lines.insert(0, f"{together.title}: {' '.join(answer_of_sweep(together))}")
    title = sections[0].title if len(found) == 1 else f"{len(found)} sweeps and runs"
    return write_page(title, sections, output), lines


def _joined(
    found: Sequence[tuple[list[Path], SweepResults | RunResults]],
) -> list[tuple[list[Path], SweepResults | RunResults]]:
    """`found`, paths and what is there, with the parts of a sweep at the place of the first of them."""
    kept: list[tuple[list[Path], SweepResults | RunResults]] = []
    for paths, each in found:
        for number, (others, other) in enumerate(kept):
            if isinstance(each, SweepResults) and isinstance(other, SweepResults) and belong_together(other, each):
                kept[number] = [*others, *paths], join(other, each)
                break
        else:
            kept.append((paths, each))
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


def _key(each: SweepResults | RunResults, path: Path, taken: Sequence[str]) -> str:
    name = each.name if isinstance(each, SweepResults) else os.path.basename(path.resolve())
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "part"
    return slug if slug not in taken else f"{slug}-{len(taken) + 1}"
