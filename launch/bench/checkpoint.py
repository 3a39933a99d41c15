"""Time saves in turns: the Saver, in the background and blocking, DeepSpeed's, torch.save."""

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitfleet.launch.bench.command import Checkpoint
from bitfleet.launch.bench.timing import interleave, ratio, seconds_per_call, synchronize, titled
from bitfleet.launch.bench.training import Method, RankStep
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import is_binary
from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.checkpoint.format import model_signature, verify
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.checkpoint.tensors import MODEL, OPTIM, tensors_to_save, total_bytes
from bitfleet.trainer.ranks.collectives import (
    Ranks,
    all_gather_objects,
    all_reduce_max,
    all_reduce_number,
    barrier,
    broadcast_object,
)

NETWORKS = {"xnornet": 224, "birealnet18": 64, "birealnet_small": 28}
"""Network -> pixels of a side."""
BACKGROUND, BLOCKING = "Saver, in the background", "Saver, blocking"
CPU = torch.device("cpu")


class Cost(NamedTuple):
    """One checkpoint, on the slowest rank."""

    stall_seconds: float
    """Seconds until training may continue."""
    seconds: float
    """Seconds until it is flushed to the disk; for the Saver also hashed and committed."""
    num_bytes: int
    """All files of all ranks."""


def bench_checkpoint(options: Checkpoint, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Save the same network in each way, in a new folder that is deleted in the end.

    Raises:
        ValueError: the folder cannot be written.
    """
    folder = ""
    if ranks.is_main:  # an error here ends the job of all ranks
        try:
            options.folder.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.folder)
        except OSError as error:
            raise ValueError(
                f"--folder {options.folder} cannot be written: {error.strerror}; choose another"
            ) from error
    folder = broadcast_object(folder)
    try:
        yield _measure(options, ranks, device, Path(folder))
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _measure(options: Checkpoint, ranks: Ranks, device: torch.device, folder: Path) -> str:
    size = NETWORKS[options.network]
    model = functools.partial(create_model, ModelConfig(name=options.network))
    images = torch.randn(2, 3, size, size, device=device)
    torch.manual_seed(0)
    methods: tuple[Method, ...] = ("bits", "zero1", "ddp")
    bits, zero, plain = (RankStep(method, model(), images, ranks) for method in methods)
    signature = model_signature(bits.model)

    def train() -> None:
        bits()
        synchronize(device)

    train()  # all state exists from here on
    zero()
    plain()
    saver = Saver(folder, CheckpointConfig(keep_last=1, keep_best=False), ranks, dict)
    num_saves = 0

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

    other = folder / "other"
    saves: dict[str, Callable[[], object]] = {
        BACKGROUND: start,
        BLOCKING: blocking,
        "DeepSpeed ZeRO-1 save_checkpoint": lambda: zero.engine.save_checkpoint(
            str(other), tag="engine", save_latest=False
        ),
        "torch.save on rank 0": torch_save,
    }
    measured = {title: functools.partial(_cost, save, saver, other, ranks) for title, save in saves.items()}
    costs = interleave(measured, 1 + options.rounds, warm_up=0)
    during = [_while_saving(train, start, saver) for _ in range(options.rounds)]
    assert saver.last is not None
    if ranks.is_main:
        verify(saver.last)
    tensors = tensors_to_save(bits.model, bits.optimizer, ranks)
    real = {MODEL + name for name, parameter in bits.model.named_parameters() if not is_binary(parameter)}
    required = {name: tensor for name, tensor in tensors.items() if name in real or name.startswith(OPTIM)}
    return _format(options, ranks, costs, during, all_reduce_number(total_bytes(required)))


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
    return Cost(max(all_gather_objects(stall)), max(all_gather_objects(seconds)), num_bytes)


def _while_saving(train: Callable[[], None], start: Callable[[], None], saver: Saver) -> tuple[float, float]:
    """Return a training step's slow-down during a save, and an idle thread's longest pause."""

    def seconds(run: Callable[[], Any]) -> float:
        return seconds_per_call(run, 1, CPU)

    barrier()
    alone = [seconds(train) for _ in range(5)]
    before = saver.last
    start()
    during = []
    while all_reduce_max([saver.last is before])[0]:
        during.append(seconds(train))
    saver.flush()
    barrier()
    before = saver.last
    start()
    pause = 0.0
    while saver.last is before:
        pause = max(pause, seconds(lambda: time.sleep(0.001)))
    saver.flush()
    return statistics.median(during or alone) / statistics.median(alone), max(all_gather_objects(pause))


def _format(
    options: Checkpoint,
    ranks: Ranks,
    costs: dict[str, list[Cost]],
    during: list[tuple[float, float]],
    required_bytes: int,
) -> str:
    rows = [["", "stall s", "on disk s", "MB written", "MB/s per rank", "first stall s"]]
    for title, (first, *rounds) in costs.items():
        stall, seconds, num_bytes = (statistics.median(values) for values in zip(*rounds, strict=True))
        megabytes = num_bytes / 1e6
        rate = megabytes / ranks.world_size / seconds
        rows.append(
            [title, f"{stall:.3f}", f"{seconds:.3f}", f"{megabytes:,.3f}", f"{rate:,.0f}", f"{first.stall_seconds:.3f}"]
        )
    background, blocking = ([cost.stall_seconds for cost in costs[title][1:]] for title in (BACKGROUND, BLOCKING))
    slow_down, pause = (statistics.median(values) for values in zip(*during, strict=True))
    written = costs[BACKGROUND][-1].num_bytes / required_bytes
    return "\n".join(
        [
            titled(
                f"{options.network}, {ranks.world_size} ranks, median of {options.rounds} rounds; moments and "
                f"full-precision parameters: {required_bytes / 1e6:,.3f} MB",
                rows,
            ),
            f"  stall, background / blocking: {ratio(background, blocking):.3f} (at 500 MB and 2 ranks at most 0.10)",
            f"  Saver's bytes / moments and full-precision parameters: {written:.4f} (at most 1.02)",
            f"  training step during a save / without: {slow_down:.3f}",
            f"  longest pause of an idle thread during a save: {pause:.3f} s",
            "  The Saver flushes, hashes and commits. The others' files are flushed by the benchmark, in on disk s.",
        ]
    )
