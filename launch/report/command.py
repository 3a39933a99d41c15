"""`bitfleet report`: sweeps and runs as one HTML page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import parse


@dataclasses.dataclass(frozen=True)
class Report:
    """Turn sweeps and runs into FOLDER/report.html, one page that needs no other file, and
    FOLDER/report/*.png.

    A path is a sweep's folder or sweep.csv, or a run's folder. Parts of one sweep that ran
    elsewhere with other seeds become one; several runs are compared.
    """

    paths: Positional[tuple[Path, ...]]
    """Folders of sweeps and runs."""
    output: Path | None = None
    """Folder of the page. Default: the folder of the only path."""


def report(arguments: Sequence[str]) -> None:
    """Write the report; print the answer of each section and the path of the page.

    Raises:
        ValueError: an option is unknown, or a path has nothing to report.
    """
    options: Report = parse(Report, arguments, "bitfleet report")
    from bitfleet.launch.report import write_report

    page, lines = write_report(options.paths, options.output)
    print("\n".join([*lines, f"report: {page}"]))
