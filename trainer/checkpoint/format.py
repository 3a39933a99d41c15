"""Checkpoints: one folder each, for any number of ranks, committed by a rename.

    checkpoints/step-00001234/
        shard-00001-model-00001-of-00001.safetensors, ...   tensors, a file a rank (checkpoint_tensors.py)
        engine/                                             DeepSpeed's files as well (sharding "zero1", "zero2", "zero3")
        meta.json                                           position and identity of the run, sha256 of every file

All ranks write below `.tmp-00001234`; when they are done rank 0 writes meta.json, flushes and renames (checkpoint_saver.py). A
folder called step-* is therefore complete, and the newest one is the latest: there is no pointer file that could lie. Loading
compares every file with its hash (checkpoint_loader.py).
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bitfleet.trainer.run.files import flush_folder
from bitfleet.trainer.run.strict_json import finite_or_null, to_json

FOLDER = "checkpoints"
ENGINE = "engine"
META = "meta.json"
DAMAGED = "damaged-"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_epochs: int = 1
    """Save after every so many epochs, and at the end."""
    every_steps: int | None = None
    """Save also after every so many steps. None: not by steps."""
    every_minutes: float | None = 15.0
    """Save also when the last checkpoint is so many minutes old. None: not by time."""
    keep_last: int = 2
    """Keep so many of the newest checkpoints."""
    keep_every_steps: int | None = None
    """Keep for ever those whose step is a multiple of this. None: none of them."""
    keep_best: bool = True
    """Keep the one with the best validation top-1."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "keep_last", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, not {value}")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes must be positive, not {self.every_minutes}")


def checkpoints(run: Path) -> list[Path]:
    """The committed checkpoints of the run at `run`, oldest first."""
    folder = run / FOLDER
    found = [path for path in folder.iterdir() if is_checkpoint(path)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a committed checkpoint."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None and path.is_dir()


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that are in a checkpoint."""
    return int(checkpoint.name[5:])


def latest_checkpoint(run: Path) -> Path | None:
    """The newest committed checkpoint of the run at `run`."""
    found = checkpoints(run)
    return found[-1] if found else None


def model_signature(model: nn.Module) -> dict[str, list[int]]:
    """Name and shape of every tensor of `model`: which model a checkpoint belongs to."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_model(saved: Mapping[str, list[int]], current: Mapping[str, list[int]], path: Path) -> None:
    """Raise ValueError, naming the first tensor that differs, unless the signatures `saved` and `current` are equal."""
    for name in [*current, *saved]:
        if saved.get(name) != current.get(name):
            there, here = saved.get(name, "missing"), current.get(name, "missing")
            raise ValueError(
                f"the checkpoint {path} is of another model: {name} is {there} there and {here} in this configuration; "
                f"resume with the configuration that wrote it"
            )


def check_meta(saved: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless the run that wrote `saved` and this one are the same run.

    Args:
        saved: meta.json.
        expected: what this run would write; every key of it must agree.
        path: the checkpoint, for the message.
    """
    for key, value in expected.items():
        if saved.get(key) == value:
            continue
        if key == "data_sha":
            raise ValueError(
                f"cannot resume from {path}: it was trained on other data (the lists of images have sha256 "
                f"{str(saved.get(key))[:16]}, here {str(value)[:16]}): give --data.root the data set of that run; "
                "images that were added, removed, changed or set aside by bitfleet data verify since make another one"
            )
        if key == "epochs":
            raise ValueError(
                f"cannot resume from {path}: its epochs is {saved.get(key)!r}, here it is {value!r}, which would change the "
                f"schedules; resume with the same epochs, or train on from its weights: pass another --run_dir and "
                f"--init {path.parents[1]}"
            )
        same = "number of ranks" if key == "world_size" else "data and configuration"
        raise ValueError(
            f"cannot resume from {path}: its {key} is {saved.get(key)!r}, here it is {value!r}; "
            f"resume with the {same} of the run that wrote it"
        )


def file_facts(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write and flush meta.json, which ends with a hash over itself."""
    with (folder / META).open("w") as file:
        meta = finite_or_null(meta)
        file.write(to_json({**meta, "meta_sha256": _meta_sha(meta)}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint.

    Raises:
        ValueError: it is missing or not as it was written.
    """
    try:
        meta: dict[str, Any] = json.loads((checkpoint / META).read_text())
        sha = meta.pop("meta_sha256")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint {checkpoint} has no readable {META}: {error}") from error
    if sha != _meta_sha(meta):
        raise ValueError(f"the checkpoint {checkpoint} is damaged: {META} is not as it was written")
    return meta


def _meta_sha(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def damage(checkpoint: Path, files: Iterable[tuple[str, Mapping[str, Any]]]) -> str | None:
    """What is wrong with `files` (name, facts in meta.json) of a checkpoint; None if they are as they were written."""
    for name, facts in files:
        path = checkpoint / name
        try:
            found = file_facts(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found["bytes"] != facts["bytes"]:
            return f"{name} has {found['bytes']:,} bytes instead of {facts['bytes']:,}"
        if found["sha256"] != facts["sha256"]:
            return f"{name} is not as it was written (its sha256 differs)"
    return None


def foreign_file(checkpoint: Path, meta: Mapping[str, Any]) -> str | None:
    """A tensor file in the folder that the checkpoint was not written with; None if there is none."""
    known = set(meta["files"])
    found = {
        str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.suffix in (".safetensors", ".pt")
    }
    return min(found - known, default=None)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read everything again; returns meta.json.

    Raises:
        ValueError: a file is missing, foreign, truncated or changed.
    """
    meta = read_meta(checkpoint)
    problem = damage(checkpoint, meta["files"].items())
    if problem is None and (name := foreign_file(checkpoint, meta)):
        problem = f"{name} does not belong to it"
    if problem:
        raise ValueError(f"the checkpoint {checkpoint} is damaged: {problem}")
    return meta


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither loaded nor overwritten; returns its new place."""
    place = checkpoint.with_name(DAMAGED + checkpoint.name)
    for number in range(2, 1000):
        if not place.exists():
            break
        place = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}-{number}")
    os.rename(checkpoint, place)
    flush_folder(checkpoint.parent)
    return place


def superseded(found: list[Path], config: CheckpointConfig, top1: Mapping[int, float]) -> list[Path]:
    """Which of the checkpoints `found` (oldest first) the configuration does not keep.

    Args:
        found: committed checkpoints.
        config: what to keep.
        top1: validation top-1 after steps, as far as it is known.
    """
    kept = set(found[-config.keep_last :])
    if config.keep_every_steps:
        kept |= {path for path in found if step_of(path) % config.keep_every_steps == 0}
    if config.keep_best and (known := [path for path in found if step_of(path) in top1]):
        kept.add(max(known, key=lambda path: (top1[step_of(path)], step_of(path))))
    return [path for path in found if path not in kept]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; one that a kill leaves half deleted has lost its name first."""
    doomed = checkpoint.with_name(f".old-{checkpoint.name}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)
