"""The flip journal: every flip of every step of a run, so that the binary weights of any step can be rebuilt."""

from bitfleet.trainer.journal.config import JournalConfig
from bitfleet.trainer.journal.writer import JournalWriter, open_journal

__all__ = ["JournalConfig", "JournalWriter", "open_journal"]
