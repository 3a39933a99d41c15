"""What a checkpoint costs: the Saver in the background and blocking, DeepSpeed's ZeRO-1 files, torch.save; in turns."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bitfleet.launch.bench.checkpoint_table import Cost, Method, Result
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, RoutedOptimizer, build_optimizer, is_binary
from bitfleet.trainer.checkpoint import CheckpointConfig, TrainState, model_signature, verify
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.checkpoint.tensors import MODEL, OPTIM, tensors_to_save, total_bytes
from bitfleet.trainer.engine.config import EngineConfig, deepspeed_options
from bitfleet.trainer.engine.engine import backward, create_engine, shard
from bitfleet.trainer.ranks.collectives import (
    Ranks,
    barrier,
    from_first_rank,
    max_over_ranks,
    objects_from_ranks,
    sum_of_numbers,
)

NETWORKS = {"xnornet": 224, "birealnet18": 64, "birealnet_small": 28}
"""Network -> image size of the steps that it takes."""
MICRO_BATCH_SIZE = 2


def bench_checkpoint(network: str, ranks: Ranks, device: torch.device, folder: Path, *, num_rounds: int) -> Result:
    """Save the same network in each way, below a new folder in `folder` that is deleted in the end; every rank calls this.

    Raises:
        ValueError: no such network, or the folder cannot be written.
    """
    if network not in NETWORKS:
        raise ValueError(f"bench checkpoint knows the networks {', '.join(NETWORKS)}, not {network!r}")
    place = _new_folder(folder, ranks)
    try:
        return _bench(network, ranks, device, place, num_rounds)
    finally:
        if ranks.is_first:
            shutil.rmtree(place, ignore_errors=True)


def _bench(network: str, ranks: Ranks, device: torch.device, place: Path, num_rounds: int) -> Result:
    bits, train = _trained(network, "bits", ranks, device)
    zero, _ = _trained(network, "zero1", ranks, device)
    plain = _plain_state(network, device) if ranks.is_first else {}
    saver = Saver(place, CheckpointConfig(keep_last=1, keep_best=False), ranks, dict)
    num_saves = 0

    def start() -> None:
        nonlocal num_saves
        num_saves += 1
        meta = {"step": num_saves, "model": bits.signature}
        saver.save(num_saves, tensors_to_save(bits.model, bits.optimizer, ranks), meta)

    def blocking(_: Path) -> None:
        start()
        saver.flush()

    def zero1(target: Path) -> None:
        zero.engine.save_checkpoint(str(target), tag="engine", save_latest=False)

    def torch_save(target: Path) -> None:
        if ranks.is_first:
            target.mkdir()
            torch.save(plain, target / "state.pt")
        barrier()

    saves: dict[Method, Callable[[Path], None]] = {
        "background": lambda _: start(),
        "blocking": blocking,
        "zero1": zero1,
        "torch.save": torch_save,
    }
    first, *rounds = (
        {method: _measure(save, saver, place / "other", ranks) for method, save in saves.items()}
        for _ in range(num_rounds + 1)
    )
    during = [_while_saving(train, start, saver) for _ in range(num_rounds)]
    assert saver.last is not None
    if ranks.is_first:
        verify(saver.last)
    tensors = tensors_to_save(bits.model, bits.optimizer, ranks)
    sizes = sum_of_numbers(total_bytes(tensors)), sum_of_numbers(_required_bytes(bits.model, tensors))
    return Result(first, {method: [each[method] for each in rounds] for method in first}, during, *sizes)


def _new_folder(folder: Path, ranks: Ranks) -> Path:
    made = ""
    if ranks.is_first:  # if it raises, that ends the job of all ranks
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(prefix="bench-checkpoint-", dir=folder)
        except OSError as error:
            raise ValueError(f"--folder {folder} cannot be written: {error.strerror}; choose another") from error
    return Path(from_first_rank(made))


def _trained(
    network: str, sharding: Literal["bits", "zero1"], ranks: Ranks, device: torch.device
) -> tuple[TrainState, Callable[[], None]]:
    """`network` after a step, so that all state exists; and its step on random images."""
    torch.manual_seed(0)
    model = create_model(ModelConfig(name=network)).to(device)
    plain, schedules = build_optimizer(model, OptimConfig(), num_steps=1000)
    config = EngineConfig(sharding=sharding)
    options = deepspeed_options(
        config,
        global_batch_size=MICRO_BATCH_SIZE * ranks.world_size,
        num_replicas=ranks.world_size,
        world_size=ranks.world_size,
    )
    optimizer, signature = shard(plain, config, ranks.world_size), model_signature(model)
    engine = create_engine(model, optimizer, schedules, options, device)
    images = torch.randn(MICRO_BATCH_SIZE, 3, NETWORKS[network], NETWORKS[network], device=device)
    labels = torch.randint(0, 1000, (MICRO_BATCH_SIZE,), device=device)

    def step() -> None:
        backward(engine, nn.functional.cross_entropy(engine(images), labels), optimizer)
        engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    return TrainState(engine, model, optimizer, signature), step


def _plain_state(network: str, device: torch.device) -> dict[str, object]:
    """Model and whole optimizer state, random, as a plain torch loop saves them."""
    model = create_model(ModelConfig(name=network)).to(device)
    optimizer, _ = build_optimizer(model, OptimConfig(), num_steps=1000)
    assert isinstance(optimizer, RoutedOptimizer)
    optimizer.create_state()
    for state in optimizer.state.values():
        for key in state.keys() - {"step"}:
            state[key].normal_()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _measure(save: Callable[[Path], None], saver: Saver, other: Path, ranks: Ranks) -> Cost:
    """One save, between barriers. What the Saver did not write (it is in `other`) is flushed here, and deleted."""
    barrier()
    start = time.perf_counter()
    save(other)
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
    if ranks.is_first:
        shutil.rmtree(other, ignore_errors=True)
    return Cost(max(objects_from_ranks(stall)), max(objects_from_ranks(seconds)), num_bytes)


def _while_saving(train: Callable[[], None], start: Callable[[], None], saver: Saver) -> tuple[float, float]:
    """(time of a training step during a save over that of one without, longest pause of an idle thread during a save)."""
    barrier()
    alone = [_seconds(train) for _ in range(5)]
    before = saver.last
    start()
    during = []
    while max_over_ranks([saver.last is before])[0]:
        during.append(_seconds(train))
    saver.flush()
    barrier()
    before = saver.last
    start()
    pause = 0.0
    while saver.last is before:
        pause = max(pause, _seconds(lambda: time.sleep(0.001)))
    saver.flush()
    return statistics.median(during or alone) / statistics.median(alone), max(objects_from_ranks(pause))


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _required_bytes(model: nn.Module, tensors: Mapping[str, Tensor]) -> int:
    real = {MODEL + name for name, param in model.named_parameters() if not is_binary(param)}
    return total_bytes({name: each for name, each in tensors.items() if name in real or name.startswith(OPTIM)})
