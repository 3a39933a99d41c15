"""`--preflight full`: two optimizer steps, a save and reading it back, with objects of their own, before the run exists."""

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bitfleet.models import create_model
from bitfleet.optim import ShardedOptimizer, build_optimizer
from bitfleet.optim.rules.rule import RULES
from bitfleet.optim.sharding.buckets import make_buckets
from bitfleet.optim.sharding.optimizer import BUCKET_NUMEL
from bitfleet.optim.sharding.state import chunks
from bitfleet.trainer.checkpoint import (
    Checkpoints,
    RunFolder,
    TrainState,
    find_resume_checkpoint,
    identity,
    model_signature,
    seed_everything,
)
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.config import TrainConfig, resolve_replicas, to_dict, with_precision
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.config import deepspeed_options
from bitfleet.trainer.engine.engine import backward, create_engine, shard, whole_weights
from bitfleet.trainer.ranks.collectives import Ranks, barrier, from_first_rank, is_lost_peer, objects_from_ranks

NUM_STEPS = 2
MICRO_BATCH = 2
"""Images; BatchNorm needs more than one."""
Say = Callable[[str], None]


def rehearse(config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
    """Try what a run does; every rank calls this before the run's own objects are built. Rank 0 prints a line a check.

    The run seeds its generators afterwards, so it begins as if this had not been. Files go into a folder beside the run's folder,
    which is removed.

    Args:
        config: the run.
        ranks: this process's place; the process group exists.
        device: where the model runs.

    Raises:
        ValueError: what failed, in a sentence.
    """

    def say(text: str) -> None:
        if ranks.is_first:
            print(f"preflight: {text}", flush=True)

    config = with_precision(config, device.type)
    num_replicas = resolve_replicas(config, ranks.world_size, before=config.num_replicas or ranks.world_size)
    with _named("building the network and its optimizer"):
        model, parts = _build(config, ranks, device, num_replicas)
    try:
        with _named(f"{NUM_STEPS} optimizer steps on random images"):
            _try_steps(config, model, parts, ranks, device, num_replicas, say)
        with _named("saving and reading back"), _scratch_folder(config, ranks) as folder:
            _try_checkpoint(config, model, parts, ranks, num_replicas, folder, say)
    finally:
        if isinstance(parts.optimizer, ShardedOptimizer):
            parts.optimizer.close()
        parts.engine.destroy()
        del model, parts
        gc.collect()


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say which part of the preflight failed."""
    try:
        yield
    except Exception as error:
        if is_lost_peer(error):  # the cause is another rank's
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--preflight full: {what} failed: {reason}; nothing has been written for the run") from error


@contextmanager
def _scratch_folder(config: TrainConfig, ranks: Ranks) -> Iterator[Path]:
    """A folder on the disk of the run, the same one for all ranks."""
    below = (config.run_dir or config.output / config.name / "run").absolute().parent
    while not below.exists():
        below = below.parent
    made = tempfile.mkdtemp(prefix=".bitfleet-preflight-", dir=below) if ranks.is_first else ""
    folder = Path(from_first_rank(made))
    try:
        if blind := [rank for rank, sees in enumerate(objects_from_ranks(folder.is_dir())) if not sees]:
            raise ValueError(f"rank {blind[0]} does not see {folder}, which rank 0 made: the run needs a shared folder")
        yield folder
        barrier()
    finally:
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _build(config: TrainConfig, ranks: Ranks, device: torch.device, num_replicas: int) -> tuple[nn.Module, TrainState]:
    options = deepspeed_options(
        config.engine,
        global_batch_size=MICRO_BATCH * num_replicas,
        num_replicas=num_replicas,
        world_size=ranks.world_size,
    )
    seed_everything(config.seed)
    model = create_model(config.model).to(device)
    plain, schedules = build_optimizer(model, config.optim, num_steps=NUM_STEPS + 1)
    signature = model_signature(model)
    optimizer = shard(plain, config.engine, num_replicas)
    engine = create_engine(model, optimizer, schedules, options, device)
    return model, TrainState(engine, model, optimizer, signature)


def _step(
    config: TrainConfig,
    engine: Any,
    optimizer: Optimizer,
    statistics: RunningStatistics,
    device: torch.device,
    generator: torch.Generator,
) -> float:
    """One optimizer step on random images; the loss of its first micro-batch."""
    losses = []
    size = config.data.image_size
    for _ in range(engine.gradient_accumulation_steps()):
        with statistics.replica():
            images = torch.randn(MICRO_BATCH, 3, size, size, generator=generator)
            labels = torch.randint(config.model.num_classes, (MICRO_BATCH,), generator=generator)
            logits: Tensor = engine(images.to(device).contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), labels.to(device))
            backward(engine, loss, optimizer)
        engine.step()
        losses.append(loss.detach())
    statistics.end_step()
    return float(losses[0])


def _try_steps(
    config: TrainConfig,
    model: nn.Module,
    parts: TrainState,
    ranks: Ranks,
    device: torch.device,
    num_replicas: int,
    say: Say,
) -> None:
    """Raise ValueError unless losses are finite, no step is skipped, and binary weights are +-1 and equal on all ranks."""
    generator = torch.Generator().manual_seed(ranks.rank)
    parts.engine.train()
    statistics = RunningStatistics(model, num_replicas)
    losses = [_step(config, parts.engine, parts.optimizer, statistics, device, generator) for _ in range(NUM_STEPS)]
    optimizer = parts.optimizer
    checked = ""
    if isinstance(optimizer, ShardedOptimizer):
        if optimizer.num_skipped_steps and optimizer.loss_scale is None:  # which such steps may be needed to find
            names = ", ".join(optimizer.nonfinite[:3]) or "all parameters together"
            raise ValueError(f"the gradient of {names} is not finite")
        optimizer.check_agreement()
        checked = ", equal on all ranks" if ranks.world_size > 1 else ""
    with whole_weights(parts.engine):
        _agree(_problem_of_steps(model, optimizer, losses))
    say(
        f"{NUM_STEPS} optimizer steps of {config.model.name} on {MICRO_BATCH} random images a micro-batch: losses "
        f"{', '.join(f'{loss:.2f}' for loss in losses)}; binary weights are +-1{checked}"
    )


def _problem_of_steps(model: nn.Module, optimizer: Optimizer, losses: list[float]) -> str | None:
    if not torch.tensor(losses).isfinite().all():
        return f"the losses are {losses}"
    flipped = {name for group in optimizer.param_groups if RULES[group["rule"]].flips for name in group["param_names"]}
    for name, param in model.named_parameters():
        if name in flipped and not bool((param.abs() == 1).all()):
            return f"the binary weight {name} is not +-1"
    return None


def _agree(problem: str | None) -> None:
    """Raise ValueError on all ranks for what one of them found, so that they clean up together; every rank calls this."""
    for rank, found in enumerate(objects_from_ranks(problem)):
        if found:
            raise ValueError(f"{found} (rank {rank})")


def _try_checkpoint(
    config: TrainConfig, model: nn.Module, parts: TrainState, ranks: Ranks, num_replicas: int, folder: Path, say: Say
) -> None:
    """Raise ValueError unless what was saved is read back, here and by other numbers of ranks, with equal bits."""

    def checkpoints() -> Checkpoints:
        return Checkpoints(
            config.checkpoint,
            RunFolder(folder / "run", None),
            ranks,
            parts,
            identity=identity(to_dict(config), num_replicas, ranks.world_size, "", compiled=False),
            constants={"config": to_dict(config)},
            steps_per_epoch=NUM_STEPS,
            global_batch_size=config.global_batch_size,
        )

    saving = checkpoints()
    saving.save(NUM_STEPS)
    saving.saver.flush()
    elastic = parts.optimizer if config.engine.stage == 0 else None
    written = _tensors(model, parts, elastic, ranks)
    committed = saving.saver.last
    assert committed is not None
    num_bytes = sum(file.stat().st_size for file in committed.rglob("*") if file.is_file())

    _spoil(parts, elastic)
    begun = find_resume_checkpoint(RunFolder(folder / "run", committed), ranks)
    assert begun is not None
    checkpoints().resume(begun)
    _agree(difference(written, _tensors(model, parts, elastic, ranks)))
    say(f"{num_bytes / 1e6:,.1f} MB saved by {_ranks(ranks.world_size)} below {folder.parent}, read back: equal bits")

    if elastic is None:
        say(f"engine.sharding {config.engine.sharding} keeps DeepSpeed's own shards: only as many ranks can read them")
        return
    others = (1, 2 * ranks.world_size) if isinstance(elastic, ShardedOptimizer) else (1,)
    whole = _whole(model, elastic)
    problem = _problem_of_other_ranks(config, parts, committed, whole, others) if ranks.is_first else None
    _agree(problem)
    say(f"read as {' and as '.join(map(_ranks, others))} would: equal bits")


def _problem_of_other_ranks(
    config: TrainConfig, parts: TrainState, checkpoint: Path, whole: dict[str, Tensor], others: tuple[int, ...]
) -> str | None:
    """What differs when `checkpoint` is read by other numbers of ranks, in this process alone."""
    stored = checkpoint_tensors.read(checkpoint, "")
    weights = checkpoint_tensors.model_state(stored, parts.signature)
    moments = {name: tensor for name, tensor in stored.items() if name.startswith(checkpoint_tensors.OPTIM)}
    flat = {name: tensor.reshape(-1) for name, tensor in (weights | moments).items()}
    if problem := difference(whole, flat):
        return f"{problem} when one rank reads it"
    for world_size in others[1:]:
        if problem := difference(moments, _as_others_read(config, checkpoint, world_size)):
            return f"{problem} when {world_size} ranks read it"
    return None


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _tensors(model: nn.Module, parts: TrainState, elastic: Any, ranks: Ranks) -> dict[str, Tensor]:
    """Copies of what this rank saves, and of all weights and buffers."""
    with whole_weights(parts.engine):
        state = {f"state.{name}": tensor for name, tensor in model.state_dict().items()}
        found = checkpoint_tensors.tensors_to_save(model, elastic, ranks) | state
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def _spoil(parts: TrainState, elastic: Any) -> None:
    """Overwrite weights, buffers and moments, so that reading them back shows."""
    with torch.no_grad():
        if elastic is not None:
            for tensor in checkpoint_tensors.state_targets(elastic).values():
                tensor.fill_(7.0)
            for tensor in parts.model.state_dict().values():
                tensor.neg_()
            if isinstance(elastic, ShardedOptimizer):
                elastic.read_weights()


def _whole(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Weights, buffers and moments, flat, on the CPU; every rank calls this."""
    found = {name: tensor.detach().reshape(-1).cpu() for name, tensor in model.state_dict().items()}
    if isinstance(optimizer, ShardedOptimizer):
        for name, state in optimizer.gather_state().items():
            for key, tensor in state.items():
                if key != "step":
                    found[f"{checkpoint_tensors.OPTIM}{key}.{name}"] = tensor.reshape(-1).cpu()
    else:
        targets = checkpoint_tensors.state_targets(optimizer)
        found |= {name: tensor.detach().cpu() for name, tensor in targets.items()}
    return found


def _as_others_read(config: TrainConfig, checkpoint: Path, world_size: int) -> dict[str, Tensor]:
    """The moments of `checkpoint` as `world_size` ranks would read them, one after the other in this process."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for rank in range(world_size):
        optimizer, _ = build_optimizer(create_model(config.model), config.optim, num_steps=NUM_STEPS + 1)
        mine = chunks(make_buckets(optimizer.param_groups, BUCKET_NUMEL, rank, world_size))
        checkpoint_tensors.read_chunks(mine, checkpoint)
        for chunk in mine:
            name = f"{checkpoint_tensors.OPTIM}{chunk.key}.{chunk.name}"
            parts.setdefault(name, []).append((chunk.offset, chunk.tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])])
        for name, found in parts.items()
    }


def difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """The first tensor, by name, that is not in both or has other bits, in words; None if there is none."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected or name not in found:
            return f"{name} is missing"
        a, b = (tensor.detach().cpu().contiguous().view(-1) for tensor in (expected[name], found[name]))
        if a.dtype != b.dtype or a.shape != b.shape or a.numpy().tobytes() != b.numpy().tobytes():
            return f"{name} differs"
    return None
