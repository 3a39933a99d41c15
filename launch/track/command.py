"""`bitfleet track`: check entries of the track and rank them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import parse


@dataclasses.dataclass(frozen=True)
class Track:
    """Check entries of the track for rules of binary weights against its rules, and rank them.

    `bitfleet sweep track_NAME` runs an entry. Exit code 1 if one breaks a rule; each is named.
    docs/track.md has the rules.
    """

    paths: Positional[tuple[Path, ...]]
    """Folders with the sweep.csv and sweep.json of an entry, as docs/track/*."""


def track(arguments: Sequence[str]) -> None:
    """Print the table of entries.

    Raises:
        ValueError: an option is unknown, or a path holds no entry.
        SystemExit: 1 if an entry breaks a rule.
    """
    options: Track = parse(Track, arguments, "bitfleet track")
    from bitfleet.launch.track.check import ranking, read_entry

    entries = [read_entry(path) for path in options.paths]
    print(ranking(entries), flush=True)
    if any(entry.faults for entry in entries):
        raise SystemExit(1)
