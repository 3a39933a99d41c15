"""The folder of a run, and what is written into it once.

config.json     resolved configuration, git revision, versions, ranks, machine
checkpoints/    step-00001234/, one folder a checkpoint
tensorboard/    event files
metrics.jsonl   one line a logging step or validation
"""

import contextlib
import functools
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from bitfleet.trainer.config import TrainConfig, from_dict, to_dict
from bitfleet.trainer.run.files import write_atomically
from bitfleet.trainer.run.hardware import hardware
from bitfleet.trainer.run.strict_json import to_json

CONFIG = "config.json"
PACKAGES = "bitfleet torch torchvision deepspeed timm tensorboard numpy nvidia-dali-cuda130 nvidia-dali-cuda120".split()


def write_config(path: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Write config.json: the resolved configuration, `facts`, git revision, versions and the machine."""
    facts = {**facts, "git": git_revision(), "versions": versions(), "hardware": hardware()}
    content = {"config": to_dict(config), **facts}
    write_atomically(path / CONFIG, to_json(content, indent=2) + "\n")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def read_config(path: Path) -> TrainConfig:
    """The configuration of the run at `path`.

    Raises:
        ValueError: there is no run, or its file is damaged.
    """
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"{path} is not a run folder: there is no {CONFIG} in it")
    try:
        read = json.loads(file.read_text())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: expected the JSON that a run writes at its start ({error})") from error
    return from_dict(read)


def git_revision() -> str | None:
    """Revision of this checkout, "-dirty" appended when files differ; None outside of one."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
