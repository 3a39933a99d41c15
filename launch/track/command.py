"""`bitfleet track`: check entries of the track and rank them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from bitfleet.launch.parsing.commands import parse


@dataclasses.dataclass(frozen=True)
class Track:
    """Check entries of the track and rank them: which update rule reaches its target in the fewest
    steps?

    `bitfleet sweep track_NAME` runs an entry. Every broken rule of docs/track.md is named; exit
    code 1 if there is one.
    """

    paths: Positional[tuple[Path, ...]]
    """Folders with the sweep.csv and sweep.json of an entry, as docs/track/*; its seeds may be in
    several."""


def track(arguments: Sequence[str]) -> None:
    """Print the table of entries.

    Raises:
        ValueError: an option is unknown, no path is given, or one holds no entry.
        SystemExit: 1 if an entry breaks a rule.
    """
    options: Track = parse(Track, arguments, "bitfleet track")
    if not options.paths:
        raise ValueError("which entries? Name their folders, as in bitfleet track docs/track/*")
    from bitfleet.launch.track.check import ranking, read_entries

    entries = read_entries(options.paths)
    print(ranking(entries), flush=True)
    if any(entry.faults for entry in entries):
        raise SystemExit(1)
