"""The flip journal: every flip of every step of a run, to rebuild the weights of any step."""

from bitfleet.trainer.journal.config import JournalConfig
from bitfleet.trainer.journal.writer import JournalWriter, open_journal

__all__ = ["JournalConfig", "JournalWriter", "open_journal"]
