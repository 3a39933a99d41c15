"""`bitfleet report`: sweeps and runs as one HTML page."""

from collections.abc import Sequence

from bitfleet.launch.parsing.options import take_option
from bitfleet.trainer.run.user_paths import users_path

USAGE = """usage: bitfleet report PATH... [--output FOLDER]

Turn sweeps and runs into FOLDER/report.html, one page that needs nothing else, and FOLDER/report/*.png. A PATH is a sweep's
folder or sweep.csv, or a run's folder; parts of one sweep, run with other seeds elsewhere, become one; several runs are compared.
Without --output the page goes into the folder of the only PATH."""


def report(arguments: Sequence[str]) -> None:
    """Write the report that `arguments` ask for, and print where it is and what it says.

    Raises:
        ValueError: an option is unknown, or a path has nothing to report.
    """
    if "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return
    output, paths = take_option(arguments, "--output")
    for path in paths:
        if path.startswith("-"):
            raise ValueError(f"bitfleet report has no option {path}; it knows --output FOLDER")

    from bitfleet.launch.report import write_report

    page, lines = write_report([users_path(path) for path in paths], users_path(output) if output else None)
    print("\n".join([*lines, f"report: {page}"]))
