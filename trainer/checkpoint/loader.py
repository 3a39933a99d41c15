"""Loading: the newest checkpoint whose every file is as it was written, into a model and optimizer on any number of ranks."""

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
from bitfleet.trainer.ranks.collectives import Ranks, barrier, cpu_group, objects_from_ranks

DIAGNOSTICS_SINCE = "diagnostics_since"
"""Key of meta.json: steps that were done when the memory of flips began."""


class Intact(NamedTuple):
    """A checkpoint that was read through, and its meta.json."""

    path: Path
    meta: dict[str, Any]


def check_on_all_ranks(checkpoint: Path, ranks: Ranks) -> tuple[Intact | None, str | None]:
    """Verify a checkpoint, each rank a part of its files; returns it, or what is wrong. The same on every rank."""
    problem, meta = None, {}
    try:
        meta = read_meta(checkpoint)
        problem = damage(checkpoint, list(meta["files"].items())[ranks.rank :: ranks.world_size])
        if problem is None and (name := foreign_file(checkpoint, meta)):
            problem = f"{name} does not belong to it"
    except ValueError as error:
        problem = str(error)
    problem = next((found for found in objects_from_ranks(problem) if found), None)
    return (None, problem) if problem else (Intact(checkpoint, meta), None)


def find_intact(run: Path, ranks: Ranks) -> Intact | None:
    """The newest intact checkpoint of the run at `run`; damaged ones are said, and renamed so that nothing overwrites them.

    Raises:
        ValueError: there are checkpoints, but none is intact.
    """
    found = checkpoints(run)
    # Every rank's own view of a shared folder may lag; rank 0 renames, so all go by its list.
    problems = []
    for path in objects_from_ranks(found[::-1])[0]:
        intact, problem = check_on_all_ranks(path, ranks)
        if intact:
            return intact
        problems.append(f"{path.name}: {problem}")
        if ranks.is_first:
            place = set_aside(path)
            print(f"bitfleet: {path} is damaged ({problem}); kept as {place.name}", file=sys.stderr, flush=True)
        barrier()
    if problems:
        raise ValueError(f"no checkpoint of {run} is intact: {'; '.join(problems)}")
    return None


def load_given(checkpoint: Path, ranks: Ranks) -> Intact:
    """The checkpoint that a user named.

    Raises:
        ValueError: it is damaged.
    """
    intact, problem = check_on_all_ranks(checkpoint, ranks)
    if intact is None:
        raise ValueError(f"the checkpoint {checkpoint} is damaged: {problem}")
    return intact


@torch.no_grad()
def load(model: nn.Module, optimizer: Optimizer, checkpoint: Intact) -> None:
    """Fill weights, buffers, moments and counts; every rank calls this. Not for DeepSpeed's own shards."""
    path, meta = checkpoint
    names = checkpoint_tensors.contents(path)
    targets = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in names.items()
        if name.startswith((checkpoint_tensors.MODEL, checkpoint_tensors.BITS))
    }
    moments = checkpoint_tensors.state_targets(optimizer)
    if missing := sorted(set(moments) - set(names)):
        raise ValueError(f"the checkpoint {path} has no {missing[0]}, which this optimizer needs")
    checkpoint_tensors.read_into(targets | moments, path, cpu_group("control"))
    model.load_state_dict(checkpoint_tensors.model_state(targets, model_signature(model)))
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.load_steps(meta["optimizer_steps"], meta["step"], meta["skipped_steps"])
        optimizer.load_transition_state(meta.get("transitions"))
        if optimizer.loss_scale is not None and meta.get("loss_scale"):
            optimizer.loss_scale.load(meta["loss_scale"])
    else:
        assert isinstance(optimizer, RoutedOptimizer)
        optimizer.load_steps(meta["optimizer_steps"])


def load_diagnostics(diagnostics: BitDiagnostics, checkpoint: Intact, ranks: Ranks) -> None:
    """Fill the memory of flips, after `load`; every rank calls this. A checkpoint without one begins it, and rank 0 says so."""
    path, meta = checkpoint
    since = meta.get(DIAGNOSTICS_SINCE)
    if since is not None:
        checkpoint_tensors.read_into(checkpoint_tensors.diagnostics_targets(diagnostics), path, cpu_group("control"))
    elif ranks.is_first:
        print(
            f"bitfleet: {path} was written without metrics.diagnostics: they begin after step {meta['step']:,}",
            file=sys.stderr,
            flush=True,
        )
    diagnostics.begin(meta["step"] if since is None else since)


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Load weights and buffers alone, in one process.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    meta = verify(checkpoint)
    check_model(meta["model"], model_signature(model), checkpoint)
    tensors = checkpoint_tensors.read(checkpoint, checkpoint_tensors.MODEL, checkpoint_tensors.BITS)
    model.load_state_dict(checkpoint_tensors.model_state(tensors, model_signature(model)))
