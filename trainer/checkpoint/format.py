"""The format of checkpoints: one folder each, for any number of ranks, committed by a rename.

    checkpoints/step-00001234/
        shard-00001-model-...safetensors   tensors, one file per rank (tensors.py)
        engine/                            DeepSpeed's files (sharding "zero1", "zero2", "zero3")
        meta.json                          position and identity of the run, sha256 of every file

All ranks write below `.tmp-00001234`; when they are done rank 0 writes meta.json, flushes and
renames (saver.py). A folder called step-* is therefore complete and the newest one is the latest:
there is no pointer file that could be wrong. Loading compares every file with its hash (loader.py).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.run.files import flush_folder, write_atomically
from bitfleet.trainer.run.strict_json import finite_or_null, to_json

FOLDER = "checkpoints"
ENGINE = "engine"
META = "meta.json"
DAMAGED = "damaged-"


def checkpoints(run: Path) -> list[Path]:
    """List the committed checkpoints of the run folder `run`, oldest first."""
    folder = run / FOLDER
    committed = [path for path in folder.iterdir() if is_checkpoint(path)] if folder.is_dir() else []
    return sorted(committed, key=step_of)


def is_checkpoint(path: Path) -> bool:
    """Return True if `path` is a committed checkpoint."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None and path.is_dir()


def absolute(checkpoint: Path) -> Path:
    """Return the path of a checkpoint in its run, whose folder of them may be a link to another
    disk."""
    return Path(os.path.abspath(checkpoint))


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps done before a checkpoint was saved."""
    return int(checkpoint.name[5:])


def latest_checkpoint(run: Path) -> Path | None:
    """Return the newest committed checkpoint of the run folder `run`, or None."""
    return max(checkpoints(run), key=step_of, default=None)


def model_signature(model: nn.Module) -> dict[str, list[int]]:
    """Return name -> shape of every tensor of `model`, to tell models apart."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_model(saved: Mapping[str, list[int]], current: Mapping[str, list[int]], path: Path) -> None:
    """Raise ValueError, naming the first difference, unless two model signatures are equal."""
    for name in [*current, *saved]:
        if saved.get(name) != current.get(name):
            there, here = saved.get(name, "missing"), current.get(name, "missing")
            raise ValueError(
                f"the checkpoint {path} is of another model: {name} is {there} there and {here} in this "
                f"configuration; resume with the configuration that wrote it"
            )


def check_meta(saved: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless the run that wrote a checkpoint and this one are the same run.

    Args:
        saved: meta.json of the checkpoint.
        expected: identity of this run; every key must have the same value in `saved`.
        path: the checkpoint, for the message.
    """
    for key, value in expected.items():
        if saved.get(key) == value:
            continue
        if key == "data_sha":
            raise ValueError(
                f"cannot resume from {path}: it was trained on other data (the lists of images have sha256 "
                f"{str(saved.get(key))[:16]}, here {str(value)[:16]}): pass the data set of that run as "
                f"--data.root; adding, removing or changing images, also by bitfleet data verify, makes it another one"
            )
        if key == "epochs":
            raise ValueError(
                f"cannot resume from {path}: its epochs is {saved.get(key)!r}, here it is {value!r}, which would "
                f"change the schedules; resume with the same epochs, or start another run from its weights with "
                f"another --run_dir and --init {path.parents[1]}"
            )
        same = "number of ranks" if key == "world_size" else "data and configuration"
        raise ValueError(
            f"cannot resume from {path}: its {key} is {saved.get(key)!r}, here it is {value!r}; "
            f"resume with the {same} of the run that wrote it"
        )


def file_facts(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write and flush meta.json, with a hash of its content as the last key."""
    meta = finite_or_null(meta)
    write_atomically(folder / META, to_json({**meta, "meta_sha256": _meta_sha(meta)}, indent=2) + "\n")


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Read meta.json of a checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        meta: dict[str, Any] = json.loads((checkpoint / META).read_text())
        sha = meta.pop("meta_sha256")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint {checkpoint} has no readable {META}: {error}") from error
    if sha != _meta_sha(meta):
        raise ValueError(f"the checkpoint {checkpoint} is damaged: {META} has changed since it was written")
    return meta


def _meta_sha(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def damage(checkpoint: Path, files: Iterable[tuple[str, Mapping[str, Any]]]) -> str | None:
    """Compare files with their size and hash in meta.json; describe the first problem, if any."""
    for name, expected in files:
        try:
            actual = file_facts(checkpoint / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual["bytes"] != expected["bytes"]:
            return f"{name} has {actual['bytes']:,} bytes instead of {expected['bytes']:,}"
        if actual["sha256"] != expected["sha256"]:
            return f"{name} has changed since it was written (its sha256 differs)"
    return None


def foreign_file(checkpoint: Path, meta: Mapping[str, Any]) -> str | None:
    """Describe a tensor file in the folder that meta.json does not list; None if there is none."""
    files = [path for path in checkpoint.rglob("*") if path.suffix in (".safetensors", ".pt")]
    foreign = {str(path.relative_to(checkpoint)) for path in files} - set(meta["files"])
    return f"{min(foreign)} does not belong to it" if foreign else None


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read every file of a checkpoint, compare it with its hash, and return meta.json.

    Raises:
        ValueError: a file is missing, foreign, truncated or changed.
    """
    meta = read_meta(checkpoint)
    if problem := damage(checkpoint, meta["files"].items()) or foreign_file(checkpoint, meta):
        raise ValueError(f"the checkpoint {checkpoint} is damaged: {problem}")
    return meta


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, to neither load nor overwrite it; return its new path."""
    path = checkpoint.with_name(DAMAGED + checkpoint.name)
    for index in range(2, 1000):
        if not path.exists():
            break
        path = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}-{index}")
    os.rename(checkpoint, path)
    flush_folder(checkpoint.parent)
    return path


def superseded(committed: list[Path], config: CheckpointConfig, top1: Mapping[int, float]) -> list[Path]:
    """Select the checkpoints to delete.

    Args:
        committed: all checkpoints of a run, oldest first.
        config: what to keep.
        top1: step -> validation top-1, where known.
    """
    kept = set(committed[-config.keep_last :])
    if config.keep_every_steps:
        kept |= {path for path in committed if step_of(path) % config.keep_every_steps == 0}
    if config.keep_best and (validated := [path for path in committed if step_of(path) in top1]):
        kept.add(max(validated, key=lambda path: (top1[step_of(path)], step_of(path))))
    return [path for path in committed if path not in kept]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, renaming it first: a kill halfway leaves no incomplete one, and files
    that are being read, which NFS does not delete, are left for the next time."""
    renamed = checkpoint.with_name(f".old-{checkpoint.name}")
    os.rename(checkpoint, renamed)
    shutil.rmtree(renamed, ignore_errors=True)
