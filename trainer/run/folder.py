"""The folder of a run, and what is written into it once.

config.json     resolved configuration, git revision, versions, ranks, machine
checkpoints/    step-00001234/, one folder a checkpoint
tensorboard/    event files
metrics.jsonl   one line a logging step or validation
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.strict_json import to_json
from bitfleet.trainer.run.versions import git_revision, hardware, versions

CONFIG = "config.json"


def write_config(path: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write config.json: the resolved configuration, `facts`, git revision, versions and the
    machine."""
    facts = {**facts, "git": git_revision(), "versions": versions(), "hardware": hardware()}
    content = {"config": config, **facts}
    write_atomically(path / CONFIG, to_json(content, indent=2) + "\n")


def read_resolved(path: Path) -> dict[str, Any]:
    """Return the resolved configuration of the run at `path`, as JSON types.

    Raises:
        ValueError: there is no run, or its file is damaged.
    """
    resolved: dict[str, Any] = read_facts(path)["config"]
    return resolved


def read_facts(path: Path) -> dict[str, Any]:
    """Return what the run at `path` wrote at its start: "config" and the facts about its place.

    Raises:
        ValueError: there is no run, or its file is damaged.
    """
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"{path} is not a run folder: there is no {CONFIG} in it")
    try:
        facts: dict[str, Any] = json.loads(file.read_text())
        facts["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: expected the JSON that a run writes at its start ({error})") from error
    return facts
