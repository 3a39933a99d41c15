"""Checkpoints: one folder each, committed by a rename.

    checkpoints/step-00001234/
        model.safetensors               all parameters and buffers
        optimizer-00000-of-00002.safetensors, ...   each rank's share of the optimizer state (sharding "bits")
        engine/                         DeepSpeed's files instead of those (sharding "none", "zero1", "zero2", "zero3")
        meta.json                       position, geometry and identity of the run

All ranks write below `.tmp-00001234`; when they are done rank 0 writes meta.json, flushes and renames. A folder called step-* is
therefore complete, and the newest one is the latest: there is no pointer file that could lie.
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.distributed import Ranks, barrier
from bitfleet.trainer.engine import whole_weights

FOLDER = "checkpoints"
ENGINE = "engine"
MODEL = "model.safetensors"
META = "meta.json"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_epochs: int = 1
    """Save after every so many epochs, and at the end."""
    every_steps: int | None = None
    """Save also after every so many steps. None: only at epoch ends."""
    keep_last: int = 2
    """Keep so many of the newest checkpoints."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "keep_last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, not {value}")


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of the run at `run`, oldest first."""
    folder = run / FOLDER
    found = [path for path in folder.iterdir() if is_checkpoint(path)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a committed checkpoint."""
    return re.fullmatch(r"step-\d{8,}", path.name) is not None and (path / META).is_file()


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of the run at `run`."""
    found = checkpoints(run)
    return found[-1] if found else None


def model_signature(model: nn.Module) -> dict[str, list[int]]:
    """Name and shape of every tensor of `model`: which model a checkpoint belongs to."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def check_model(saved: dict[str, list[int]], current: dict[str, list[int]], path: Path) -> None:
    """Raise ValueError, naming the first tensor that differs, unless the signatures `saved` and `current` are equal."""
    for name in [*current, *saved]:
        if saved.get(name) != current.get(name):
            there, here = saved.get(name, "missing"), current.get(name, "missing")
            raise ValueError(
                f"the checkpoint {path} is of another model: {name} is {there} there and {here} in this configuration; "
                f"resume with the configuration that wrote it"
            )


def shard_name(ranks: Ranks) -> str:
    """File of this rank's share of the optimizer state."""
    return f"optimizer-{ranks.rank:05d}-of-{ranks.world_size:05d}.safetensors"


def save(
    engine: Any,
    model: nn.Module,
    optimizer: Optimizer,
    run: Path,
    step: int,
    meta: dict[str, Any],
    *,
    ranks: Ranks,
    keep_last: int,
) -> Path:
    """Write and commit a checkpoint; every rank calls this.

    Args:
        engine: the DeepSpeed engine.
        model: the module inside it.
        optimizer: the optimizer inside it.
        run: run folder.
        step: optimizer steps done.
        meta: position, geometry and identity, JSON types.
        ranks: this process's place.
        keep_last: older checkpoints are deleted after the commit.

    Returns:
        The committed folder.
    """
    folder = run / FOLDER
    temporary, committed = folder / f".tmp-{step:08d}", folder / f"step-{step:08d}"
    assert not committed.exists(), committed
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    if isinstance(optimizer, ShardedOptimizer):
        save_file(optimizer.shard(), temporary / shard_name(ranks))
        meta = meta | {"optimizer_steps": optimizer.steps()}
    else:
        engine.save_checkpoint(str(temporary), tag=ENGINE, save_latest=False)
    barrier()  # every rank's files are there
    with whole_weights(engine):
        if ranks.is_first:
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary / MODEL)
            meta = meta | {"step": step, "world_size": ranks.world_size, "model": model_signature(model)}
    if ranks.is_first:
        (temporary / META).write_text(json.dumps(meta, indent=2) + "\n")
        _flush(temporary)
        os.rename(temporary, committed)
        _flush_folder(folder)
        for old in checkpoints(run)[:-keep_last]:
            shutil.rmtree(old)
    barrier()
    return committed


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """meta.json of a checkpoint."""
    meta: dict[str, Any] = json.loads((checkpoint / META).read_text())
    return meta


def check_meta(saved: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the run that wrote `saved` and this one are the same run.

    Args:
        saved: meta.json.
        expected: what this run would write; every key of it must agree.
        path: the checkpoint, for the message.
    """
    for key, value in expected.items():
        if saved.get(key) != value:
            raise ValueError(
                f"cannot resume from {path}: its {key} is {saved.get(key)!r}, here it is {value!r}; "
                f"resume with the same ranks, data and configuration as the run that wrote it"
            )


def load(engine: Any, model: nn.Module, optimizer: Optimizer, checkpoint: Path, ranks: Ranks) -> None:
    """Load weights, buffers, optimizer state and schedules into `engine`; every rank calls this."""
    if not isinstance(optimizer, ShardedOptimizer):
        loaded, _ = engine.load_checkpoint(str(checkpoint), tag=ENGINE)
        assert loaded is not None, checkpoint
        return
    meta = read_meta(checkpoint)
    model.load_state_dict(load_file(checkpoint / MODEL))
    optimizer.load_shard(load_file(checkpoint / shard_name(ranks)), meta["optimizer_steps"], meta["step"])
    engine.lr_scheduler.load_state_dict({"num_steps_done": meta["step"]})
    engine.global_steps = meta["step"]


def load_model(model: nn.Module, checkpoint: Path, device: torch.device) -> None:
    """Load weights and buffers alone.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    check_model(read_meta(checkpoint)["model"], model_signature(model), checkpoint)
    model.load_state_dict(load_file(checkpoint / MODEL, device=str(device)))


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
