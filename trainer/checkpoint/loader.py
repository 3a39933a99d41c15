"""Find the newest valid checkpoint, and load it on any number of ranks."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer
from bitfleet.optim.diagnostics import BitDiagnostics
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import (
    check_model,
    checkpoints,
    damage,
    foreign_file,
    model_signature,
    read_meta,
    set_aside,
    verify,
)
from bitfleet.trainer.checkpoint.run_folder import RunFolder, start_over
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_objects, barrier, cpu_group

DIAGNOSTICS_SINCE = "diagnostics_since"
"""Key of meta.json: number of steps done when the flip memory was started."""


class ValidCheckpoint(NamedTuple):
    """A checkpoint whose files all have the right hash, and its meta.json."""

    path: Path
    meta: dict[str, Any]


def find_resume_checkpoint(folder: RunFolder, ranks: Ranks) -> ValidCheckpoint | None:
    """Find the checkpoint to resume from, None for a new run; every rank calls this.

    If the newest one of the run is damaged, say so, rename it and take the one before; a checkpoint
    of another run is never replaced.

    Raises:
        ValueError: the run, or the checkpoint named, has no valid checkpoint.
    """
    if folder.checkpoint is None:
        return None
    if not folder.branches:
        return _newest_valid(folder.path, ranks)
    valid, problem = _verify_on_all_ranks(folder.checkpoint, ranks)
    if valid is None:
        raise ValueError(f"the checkpoint {folder.checkpoint} is damaged: {problem}")
    return valid


def _newest_valid(run: Path, ranks: Ranks) -> ValidCheckpoint | None:
    problems = []
    # Each rank's view of a shared folder may lag behind. Rank 0 renames, so all use its list.
    for path in all_gather_objects(checkpoints(run)[::-1])[0]:
        valid, problem = _verify_on_all_ranks(path, ranks)
        if valid:
            return valid
        problems.append(f"{path.name}: {problem}")
        if ranks.is_main:
            renamed = set_aside(path)
            print(f"bitfleet: {path} is damaged ({problem}); renamed to {renamed.name}", file=sys.stderr, flush=True)
        barrier()
    if problems:
        raise ValueError(f"no checkpoint of {run} is intact ({'; '.join(problems)}): {start_over(run)}")
    return None


def _verify_on_all_ranks(checkpoint: Path, ranks: Ranks) -> tuple[ValidCheckpoint | None, str | None]:
    """Verify a share of the files per rank; return the checkpoint or the problem to all ranks."""
    problem, meta = None, {}
    try:
        meta = read_meta(checkpoint)
        share = list(meta["files"].items())[ranks.rank :: ranks.world_size]
        problem = damage(checkpoint, share) or foreign_file(checkpoint, meta)
    except ValueError as error:
        problem = str(error)
    problem = next((text for text in all_gather_objects(problem) if text), None)
    return (None, problem) if problem else (ValidCheckpoint(checkpoint, meta), None)


@torch.no_grad()
def load(model: nn.Module, optimizer: Optimizer, checkpoint: ValidCheckpoint) -> None:
    """Load weights, buffers, moments and step counts (not ZeRO's); every rank calls this."""
    path, meta = checkpoint
    weights = checkpoint_tensors.empty_tensors(path, checkpoint_tensors.MODEL, checkpoint_tensors.BITS)
    moments = checkpoint_tensors.state_targets(optimizer)
    if missing := sorted(moments.keys() - checkpoint_tensors.contents(path)):
        raise ValueError(f"the checkpoint {path} has no {missing[0]}, which this optimizer needs")
    checkpoint_tensors.read_into(weights | moments, path, cpu_group("control"))
    model.load_state_dict(checkpoint_tensors.model_state(weights, model_signature(model)))
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.load_steps(meta["optimizer_steps"], meta["step"], meta["skipped_steps"])
        optimizer.load_transition_state(meta.get("transitions"))
        if optimizer.loss_scale is not None and meta.get("loss_scale"):
            optimizer.loss_scale.load(meta["loss_scale"])
    else:
        assert isinstance(optimizer, RoutedOptimizer)
        optimizer.load_steps(meta["optimizer_steps"])


def load_diagnostics(diagnostics: BitDiagnostics, checkpoint: ValidCheckpoint, ranks: Ranks) -> None:
    """Load the flip memory, after `load`, or start it and say so; every rank calls this."""
    path, meta = checkpoint
    since = meta.get(DIAGNOSTICS_SINCE)
    if since is not None:
        checkpoint_tensors.read_into(checkpoint_tensors.diagnostics_targets(diagnostics), path, cpu_group("control"))
    elif ranks.is_main:
        print(
            f"bitfleet: {path} was written without metrics.diagnostics: they start after step {meta['step']:,}",
            file=sys.stderr,
            flush=True,
        )
    diagnostics.begin(meta["step"] if since is None else since)


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Load only weights and buffers, in one process.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to another model.
    """
    signature = model_signature(model)
    check_model(verify(checkpoint)["model"], signature, checkpoint)
    tensors = checkpoint_tensors.read(checkpoint, checkpoint_tensors.MODEL, checkpoint_tensors.BITS)
    model.load_state_dict(checkpoint_tensors.model_state(tensors, signature))
