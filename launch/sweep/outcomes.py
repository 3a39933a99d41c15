"""What became of the runs of a sweep, remembered in its folder; and what a run that failed had to say."""

import dataclasses
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from bitfleet.launch.sweep.pool import Ended
from bitfleet.trainer.ranks.exit_codes import error_sentences
from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.strict_json import to_json

FILE = "outcomes.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    status: Literal["pending", "finished", "failed"] = "pending"
    seconds: float = 0.0
    """Of all its attempts."""
    failures: int = 0
    """In all."""
    error: str = ""
    """The sentence of the last failure, "" after success."""


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """Name of a run -> what became of it; nothing for a folder in which no sweep has been.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Outcome]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{file} is damaged: delete it; the same command then continues each run from its last checkpoint, which for a "
            f"finished one takes seconds"
        ) from error


def write_outcomes(folder: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Remember `outcomes` in `folder`."""
    content = {name: dataclasses.asdict(each) for name, each in outcomes.items()}
    write_atomically(folder / FILE, to_json(content, indent=1) + "\n")


def sentence_of(ended: Ended) -> str:
    """Why a run failed: its own sentence, else how it ended."""
    if said := error_sentences(ended.output):
        return str(said[-1]).strip()
    how = f"it left with exit code {ended.code}"
    if ended.code < 0:
        how = f"it was killed by {signal.Signals(-ended.code).name}"
    elif ended.code == 0:
        how += ", but there is no validation in its folder"
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    return f"{how}; the last line of {ended.job.log} is {lines[-1] if lines else 'missing'!r}"
