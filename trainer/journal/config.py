"""Options of the flip journal."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JournalConfig:
    """The flip journal (docs/journal.md)."""

    enabled: bool = False
    """Write every flip of every step below `journal/` of the run, so that `bitfleet journal` can
    rebuild the binary weights of any step. Needs engine.sharding "bits"."""
