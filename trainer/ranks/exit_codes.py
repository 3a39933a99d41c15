"""Exit codes of a job, and the line in which it says why it failed."""

import re

CRASH, USER_ERROR = 1, 2
REQUEUE = 75
"""Exit code of a run that was asked to stop and saved its state: the same command continues it
(EX_TEMPFAIL of sysexits.h)."""
_ERROR_LINE = re.compile(r"^bitfleet: error(?: \(rank [^)]*\))?: (.*)$", re.MULTILINE)


def error_line(sentence: str, who: str = "") -> str:
    """Return the line that says on stderr why a job fails; `who` is as " (rank 3 on host-b)"."""
    return f"bitfleet: error{who}: {sentence}"


def error_sentences(log: str) -> list[str]:
    """Return the sentences of all error lines in the output of a job."""
    return _ERROR_LINE.findall(log)
