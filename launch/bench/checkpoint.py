"""Time saves in turns: the Saver, in the background and blocking, DeepSpeed's, torch.save."""

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bitfleet.launch.bench.command import Checkpoint
from bitfleet.launch.bench.results import Row, titled
from bitfleet.launch.bench.timing import interleave, ratio, seconds_per_call
from bitfleet.launch.bench.training import TrainingStep
from bitfleet.models import ModelConfig, create_model
from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.checkpoint.format import model_signature, verify
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.checkpoint.tensors import tensors_to_save
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_numbers, all_reduce_max, barrier, broadcast_object

NETWORKS = {"xnornet": 224, "birealnet18": 64, "birealnet_small": 28}
"""Network -> pixels of a side."""
BLOCKING = "Saver, blocking"


Cost = tuple[float, float, int]
"""Times of one save on the slowest rank: seconds until training may continue; seconds until it is
flushed to the disk, for the Saver also hashed and committed; bytes of all files of all ranks."""


def bench_checkpoint(options: Checkpoint, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Save the same network in each way, in a new folder that is deleted in the end.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot be written: {error.strerror}; choose another"
        raise ValueError(f"--folder {options.folder} {reason}") from error
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.folder) as folder:
        yield from _measure(options, ranks, device, Path(broadcast_object(folder)))
        barrier()


def _measure(options: Checkpoint, ranks: Ranks, device: torch.device, folder: Path) -> Iterator[str]:
    size = NETWORKS[options.network]
    images = torch.randn(2, 3, size, size, device=device)
    bits, zero, plain = (
        TrainingStep(method, create_model(ModelConfig(name=options.network)), images, ranks.world_size)
        for method in ("bits", "zero1", "ddp")
    )
    signature = model_signature(bits.model)
    for step in (bits, zero, plain):
        step()  # all state exists from here on
    saver = Saver(folder, CheckpointConfig(keep_last=1, keep_best=False), ranks, dict)
    num_saves, other = 0, folder / "other"

    def start() -> None:
        nonlocal num_saves
        num_saves += 1
        tensors = tensors_to_save(bits.model, bits.optimizer, ranks)
        saver.save(num_saves, tensors, {"step": num_saves, "model": signature})

    def blocking() -> None:
        start()
        saver.flush()

    def torch_save() -> None:
        if ranks.is_main:
            other.mkdir()
            state = {"model": plain.model.state_dict(), "optimizer": plain.optimizer.state_dict()}
            torch.save(state, other / "state.pt")
        barrier()

    saves: dict[str, Callable[[], object]] = {
        "Saver, in the background": start,
        BLOCKING: blocking,
        "DeepSpeed ZeRO-1 save_checkpoint": lambda: zero.engine.save_checkpoint(
            str(other), tag="engine", save_latest=False
        ),
        "torch.save on rank 0": torch_save,
    }
    measured = {title: functools.partial(_cost, save, saver, other, ranks) for title, save in saves.items()}
    rows = _rows(interleave(measured, options.rounds), ranks.world_size)
    yield titled(f"{options.network}, {ranks.world_size} ranks, median of {options.rounds} rounds", rows)
    slow_down = statistics.median(_slow_down(bits, device, start, saver) for _ in range(options.rounds))
    yield f"  training step during a save / without: {slow_down:.3f}"
    assert saver.last is not None
    if ranks.is_main:
        verify(saver.last)


def _cost(save: Callable[[], object], saver: Saver, other: Path, ranks: Ranks) -> Cost:
    """Time one save between barriers; flush and delete `other`, which the Saver did not write."""
    barrier()
    start = time.perf_counter()
    save()
    stall = time.perf_counter() - start
    saver.flush()
    barrier()
    files = sorted(path for path in other.rglob("*") if path.is_file())
    for path in files[ranks.rank :: ranks.world_size]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    if not files and saver.last is not None:
        files = [path for path in saver.last.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    barrier()
    if ranks.is_main:
        shutil.rmtree(other, ignore_errors=True)
    return max(all_gather_numbers(stall)), max(all_gather_numbers(seconds)), num_bytes


def _slow_down(step: TrainingStep, device: torch.device, start: Callable[[], None], saver: Saver) -> float:
    """Return the time of a training step during a save over that of one without."""
    barrier()
    alone = [seconds_per_call(step, 1, device) for _ in range(5)]
    before = saver.last
    start()
    during = []
    while all_reduce_max([saver.last is before])[0]:
        during.append(seconds_per_call(step, 1, device))
    saver.flush()
    return statistics.median(during or alone) / statistics.median(alone)


def _rows(costs: dict[str, list[Cost]], world_size: int) -> list[Row]:
    blocking, _, _ = zip(*costs[BLOCKING], strict=True)
    rows = []
    for title, rounds in costs.items():
        stalls, seconds, num_bytes = zip(*rounds, strict=True)
        on_disk, megabytes = statistics.median(seconds), num_bytes[-1] / 1e6
        figures = {"stall s": statistics.median(stalls), "to blocking": ratio(stalls, blocking), "on disk s": on_disk}
        rows.append({"what": title, **figures, "MB": megabytes, "MB/s per rank": megabytes / world_size / on_disk})
    return rows
