"""Rehearse a run for `--preflight full`: two steps, a save and reading it back, by a trainer in a
scratch folder."""

import dataclasses
import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bitfleet.models import create_model
from bitfleet.optim import ShardedOptimizer, build_optimizer
from bitfleet.optim.rules.rule import RULES
from bitfleet.optim.sharding.buckets import make_buckets
from bitfleet.optim.sharding.optimizer import BUCKET_NUMEL
from bitfleet.optim.sharding.state import chunks
from bitfleet.trainer.checkpoint import RunFolder, find_resume_checkpoint
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.run_folder import planned_folder
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.engine.engine import whole_weights
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_objects, barrier, broadcast_object, is_lost_peer
from bitfleet.trainer.ranks.heartbeat import report_step
from bitfleet.trainer.run.out_of_memory import is_out_of_memory, out_of_memory
from bitfleet.trainer.trainer import Trainer

NUM_STEPS = 2


def rehearse(config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
    """Try what the run will do, in a folder that is removed again; every rank calls this before its
    trainer is built.

    Rank 0 prints one line per check. The run seeds its generators itself: the rehearsal does not
    change it.

    Raises:
        ValueError: a check failed.
    """
    with _named("making a folder for it"):
        folder = _make_folder(config, ranks)
    try:
        with _named("building the run"):
            trial = dataclasses.replace(config, run_dir=folder / "run", resume=None, init=None, init_head="loaded")
            trainer = Trainer(trial, ranks, device)
            trainer.start()
        try:
            with _named(f"{NUM_STEPS} optimizer steps"):
                lines = [_try_steps(trainer)]
            with _named("saving and reading back"):
                lines += _try_checkpoint(trainer)
        finally:
            trainer.stop()
            if isinstance(trainer.sharded, ShardedOptimizer):
                trainer.sharded.close()
            trainer.engine.destroy()
            del trainer
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            report_step(0)
        barrier()
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if ranks.is_main:
        print("\n".join(f"preflight: {line}" for line in lines), flush=True)


@contextmanager
def _named(stage: str) -> Iterator[None]:
    """Say in which stage of the rehearsal an error arose."""
    try:
        yield
    except Exception as error:
        if is_lost_peer(error):  # the cause is on another rank
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = out_of_memory(error) if is_out_of_memory(error) else first_line
        raise ValueError(f"--preflight full: {stage} failed: {reason}; the run has not started") from error


def _make_folder(config: TrainConfig, ranks: Ranks) -> Path:
    """Make a folder on the disk of the run, the same one for all ranks."""
    parent = planned_folder(config.output / config.name, config.run_dir, config.resume).absolute().parent
    while not parent.exists():
        parent = parent.parent
    made = tempfile.mkdtemp(prefix=".bitfleet-preflight-", dir=parent) if ranks.is_main else ""
    folder = Path(broadcast_object(made))
    if blind := [rank for rank, sees in enumerate(all_gather_objects(folder.is_dir())) if not sees]:
        if ranks.is_main:
            folder.rmdir()
        raise ValueError(f"rank {blind[0]} does not see {folder}, which rank 0 made: the run needs a shared folder")
    return folder


def _raise_on_all_ranks(problem: str | None) -> None:
    """Raise ValueError on all ranks for a problem of one of them, so that they clean up together;
    every rank calls this."""
    for rank, reported in enumerate(all_gather_objects(problem)):
        if reported:
            raise ValueError(f"{reported} (rank {rank})")


def _try_steps(trainer: Trainer) -> str:
    """Make optimizer steps on the first batches, check them, and return a line about them."""
    steps, checked, sharded = [], "", trainer.sharded
    for _ in range(NUM_STEPS):
        trainer.train_step()
        steps.append(trainer.observer.meter.read())
    if isinstance(sharded, ShardedOptimizer):
        if sharded.num_skipped_steps and sharded.loss_scale is None:  # fp16 skips steps to find its loss scale
            names = ", ".join(sharded.nonfinite[:3]) or "all parameters together"
            raise ValueError(f"the gradient of {names} is not finite")
        sharded.check_agreement()
        checked = ", equal on all ranks" if trainer.ranks.world_size > 1 else ""
    with whole_weights(trainer.engine):
        _raise_on_all_ranks(_problem_of_steps(trainer, [step.loss for step in steps]))
    losses = ", ".join(f"{step.loss:.2f}" if step.num_images else "skipped" for step in steps)
    model = trainer.config.model.name
    return f"{NUM_STEPS} optimizer steps of {model}: losses {losses}; binary weights are +-1{checked}"


def _problem_of_steps(trainer: Trainer, losses: list[float]) -> str | None:
    if not torch.tensor(losses).isfinite().all():
        return f"the losses are {losses}"
    groups = [group for group in trainer.optimizer.param_groups if RULES[group["rule"]].flips]
    flipped = {name for group in groups for name in group["param_names"]}
    for name, param in trainer.model.named_parameters():
        if name in flipped and not bool((param.abs() == 1).all()):
            return f"the binary weight {name} is not +-1"
    return None


def _try_checkpoint(trainer: Trainer) -> list[str]:
    """Save, and read it back as this and as other numbers of ranks would; return a line about
    each."""
    ranks, checkpoints = trainer.ranks, trainer.checkpoints
    trainer.save()
    checkpoints.saver.flush()
    saved, path = _saved_tensors(trainer), checkpoints.saver.last
    assert path is not None
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    elastic = trainer.config.engine.stage == 0
    if elastic:
        _overwrite(trainer)
    start = find_resume_checkpoint(RunFolder(trainer.folder.path, path), ranks)
    assert start is not None
    checkpoints.resume(start)
    _raise_on_all_ranks(difference(saved, _saved_tensors(trainer)))
    folder = trainer.folder.path.parents[1]
    lines = [f"{num_bytes / 1e6:,.1f} MB saved by {_ranks(ranks.world_size)} below {folder}, read back: equal bits"]
    if not elastic:
        sharding = trainer.config.engine.sharding
        return [*lines, f"engine.sharding {sharding} keeps DeepSpeed's own shards: only as many ranks can read them"]
    others = [1, 2 * ranks.world_size] if isinstance(trainer.sharded, ShardedOptimizer) else [1]
    whole = _whole_tensors(trainer)
    _raise_on_all_ranks(_problem_of_other_ranks(trainer, path, whole, others) if ranks.is_main else None)
    return [*lines, f"read as {' and as '.join(map(_ranks, others))} would: equal bits"]


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _saved_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of what this rank saves, and of all weights and buffers."""
    elastic = trainer.sharded if trainer.config.engine.stage == 0 else None
    with whole_weights(trainer.engine):
        saved = checkpoint_tensors.tensors_to_save(trainer.model, elastic, trainer.ranks)
        saved |= {f"state.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
        return {name: tensor.detach().clone() for name, tensor in saved.items()}


@torch.no_grad()
def _overwrite(trainer: Trainer) -> None:
    """Overwrite weights, buffers and moments, to show that they are read back."""
    for tensor in checkpoint_tensors.state_targets(trainer.sharded).values():
        tensor.fill_(7.0)
    for tensor in trainer.model.state_dict().values():
        tensor.neg_()
    if isinstance(trainer.sharded, ShardedOptimizer):
        trainer.sharded.read_weights()


def _whole_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Return weights, buffers and moments of all ranks, flat, by their names in a checkpoint; every
    rank calls this."""
    whole = {name: tensor.detach().reshape(-1) for name, tensor in trainer.model.state_dict().items()}
    if not isinstance(trainer.sharded, ShardedOptimizer):
        return whole | checkpoint_tensors.state_targets(trainer.sharded)
    return whole | {
        f"{checkpoint_tensors.OPTIM}{key}.{name}": tensor.reshape(-1)
        for name, state in trainer.sharded.gather_state().items()
        for key, tensor in state.items()
        if key != "step"
    }


def _problem_of_other_ranks(trainer: Trainer, path: Path, whole: dict[str, Tensor], others: list[int]) -> str | None:
    """Read the checkpoint `path` as other numbers of ranks, in this process alone; return a
    difference, if any."""
    stored = checkpoint_tensors.read(path, "")
    weights = checkpoint_tensors.model_state(stored, trainer.checkpoints.state.signature)
    moments = {name: tensor for name, tensor in stored.items() if name.startswith(checkpoint_tensors.OPTIM)}
    if problem := difference(whole, {name: tensor.reshape(-1) for name, tensor in (weights | moments).items()}):
        return f"{problem} when one rank reads it"
    config = trainer.config
    for world_size in others[1:]:
        expected, slices = {}, {}
        for rank in range(world_size):
            optimizer, _ = build_optimizer(create_model(config.model), config.optim, num_steps=NUM_STEPS + 1)
            own_chunks = chunks(make_buckets(optimizer.param_groups, BUCKET_NUMEL, rank, world_size))
            checkpoint_tensors.read_chunks(own_chunks, path)
            for chunk in own_chunks:
                moment, end = f"{checkpoint_tensors.OPTIM}{chunk.key}.{chunk.name}", chunk.offset + chunk.tensor.numel()
                slices[f"{moment}[{chunk.offset}:{end}]"] = chunk.tensor
                expected[f"{moment}[{chunk.offset}:{end}]"] = moments[moment][chunk.offset : end]
        is_complete = sum(tensor.numel() for tensor in slices.values()) == sum(map(Tensor.numel, moments.values()))
        if problem := difference(expected, slices) if is_complete else "a moment is incomplete":
            return f"{problem} when {world_size} ranks read it"
    return None


def difference(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> str | None:
    """Say which tensor, the first by name, is missing on one side or has other bits; None if all
    are equal."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors:
            return f"{name} is missing"
        a, b = (tensor.detach().cpu().contiguous().view(-1) for tensor in (expected[name], tensors[name]))
        if a.dtype != b.dtype or a.shape != b.shape or a.numpy().tobytes() != b.numpy().tobytes():
            return f"{name} differs"
    return None
