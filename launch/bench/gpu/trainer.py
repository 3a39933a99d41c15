"""Part "trainer" of `bitfleet bench gpu`: the real Trainer on one rank: its step time, and where it waits for the GPU.

Images are in memory (data.loader "memory"), with and without a CUDA graph of the step. What DeepSpeed's throughput timer costs
is measured with the engine alone.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from bitfleet.launch.bench.clock import seconds_per_call, synchronize
from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.gpu.syncs import PageableCopies, Places, host_waits
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.data.fashion import SUBSET_ROOT
from bitfleet.trainer.engine.config import EngineConfig, deepspeed_options
from bitfleet.trainer.engine.engine import backward, create_engine, shard
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.trainer import Trainer

_NEEDED_SECONDS = 25.0
_SHOWN_PLACES = 8
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


Loader = Literal["dali", "torch", "memory"]


class Variant(NamedTuple):
    """How the trainer gets its images and launches its step."""

    loader: Loader
    """data.loader."""
    cuda_graph: bool = False
    """engine.cuda_graph."""


VARIANTS = (Variant("memory", cuda_graph=True), Variant("memory"), Variant("torch"))
"""The fastest first. A CPU has no CUDA graph."""


def variants_of(device: torch.device) -> Sequence[Variant]:
    """Those of VARIANTS that `device` can have."""
    return [each for each in VARIANTS if device.type == "cuda" or not each.cuda_graph]


def varied(config: TrainConfig, variant: Variant, run_dir: Path, root: Path, **fields: Any) -> TrainConfig:
    """The run `config` as `variant`, in the folder `run_dir`, with other `fields`.

    It reads the images in `root`, unless its own are embedded.

    Raises:
        ValueError: the fields contradict each other.
    """
    is_embedded = config.data.root == SUBSET_ROOT
    data = dataclasses.replace(config.data, loader=variant.loader, root=config.data.root if is_embedded else str(root))
    return dataclasses.replace(
        config,
        run_dir=run_dir,
        resume=None,
        data=data,
        engine=dataclasses.replace(config.engine, cuda_graph=variant.cuda_graph),
        **fields,
    )


def tiny_fields(config: TrainConfig) -> dict[str, Any]:
    """Fields that make `config` a dry run of few images."""
    return {"global_batch_size": 10, "metrics": dataclasses.replace(config.metrics, every_steps=2)}


def write_random_images(root: Path, *, num_classes: int, train: int, val: int, size: int) -> Path:
    """Write class folders of random RGB images as PNG files, `train` and `val` for each class; returns `root`."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(num_classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:04d}.png", compress_level=1)
    return root


def measure_trainer(session: Session, configs: Sequence[TrainConfig], cifar: Path | None, ranks: Ranks) -> None:
    """Write down step time and host synchronisations of each of `configs`, then the cost of DeepSpeed's timer.

    Args:
        session: of the benchmark.
        configs: runs; those that read files and not the embedded images read `cifar`.
        cifar: class folders; random images of 32 px where it is None.
        ranks: this process alone.
    """
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as name:
        folder = Path(name)
        count = 2 if session.tiny else 200
        root = cifar or write_random_images(folder / "images", num_classes=10, train=count, val=2, size=32)
        for config in configs:
            fields = tiny_fields(config) if session.tiny else {}
            for number, variant in enumerate(variants_of(session.device)):
                what = f"{config.name}, loader {variant.loader}{', CUDA graph' * variant.cuda_graph}"
                make = functools.partial(varied, config, variant, folder / f"{config.name}{number}", root, **fields)
                arguments = (session, what, make, variant.cuda_graph, ranks)
                session.attempt(what, _measure_run, *arguments, needs_seconds=_NEEDED_SECONDS)
    for batch_size in (2,) if session.tiny else (64, 256):
        session.attempt("DeepSpeed's timer", _measure_timer, session, batch_size, needs_seconds=_NEEDED_SECONDS)


def _measure_run(session: Session, what: str, make: Callable[[], TrainConfig], has_graph: bool, ranks: Ranks) -> None:
    warm_up, counted, timed = (1, 1, 1) if session.tiny else (30, 10, 200)
    start = time.perf_counter()
    config = make()
    trainer = Trainer(config, ranks, session.device)
    trainer.start()
    try:
        for _ in range(warm_up):
            trainer.advance()  # a graph of a logging step is captured when the first one comes
        synchronize(session.device)
        seconds_to_start = time.perf_counter() - start
        _measure_syncs(session, what, trainer, counted)
        seconds = seconds_per_call(trainer.advance, timed, session.device)
        session.add(
            "step",
            run=what,
            batch_size=config.global_batch_size,
            ms=seconds * 1e3,
            images_per_second=config.global_batch_size / seconds,
            logs_every=config.metrics.every_steps,
            seconds_to_start=seconds_to_start,
        )
        if not has_graph:  # a replay passes by the dispatcher
            session.attempt("pageable copies per step", _measure_copies, session, what, trainer, counted)
    finally:
        trainer.stop()
        if isinstance(trainer.sharded, ShardedOptimizer):
            trainer.sharded.close()


def _measure_syncs(session: Session, what: str, trainer: Trainer, num_steps: int) -> None:
    """Of steps that do not log, and of one that does."""
    with host_waits(session.device) as waits:
        for _ in range(num_steps):
            trainer.train_step()
            trainer.checkpoints.saver.check()
    facts = {"total": _per_step(waits.syncs, num_steps), "places": _most(waits.syncs, num_steps)}
    session.add("host syncs per step", run=what, **facts, waits_for_an_event=_most(waits.events, num_steps))
    every = trainer.config.metrics.every_steps
    while (trainer.step + 1) % every:
        trainer.train_step()
    with host_waits(session.device) as waits:
        trainer.advance()
    facts = {"total": _per_step(waits.syncs, 1), "places": _most(waits.syncs, 1)}
    session.add("host syncs of a logging step", run=what, **facts, waits_for_an_event=_most(waits.events, 1))


def _measure_copies(session: Session, what: str, trainer: Trainer, num_steps: int) -> None:
    """From and to pageable memory, which wait for the GPU but are not among the synchronisations that torch knows of."""
    # A compiled function refuses to run under a mode that sees every operator.
    with torch.compiler.set_stance("force_eager"), PageableCopies() as copies:
        for _ in range(num_steps):
            trainer.train_step()
    facts = {"total": _per_step(copies.places, num_steps), "places": _most(copies.places, num_steps)}
    session.add("pageable copies per step", run=what, **facts)


def _per_step(places: Places, num_steps: int) -> float:
    return sum(places.values()) / num_steps


def _most(places: Places, num_steps: int) -> dict[str, float]:
    return {place: count / num_steps for place, count in places.most_common(_SHOWN_PLACES)}


def _measure_timer(session: Session, batch_size: int) -> None:
    """Bi-Real Net 18 on random images through the DeepSpeed engine, with its throughput timer and without."""
    network, size, num_steps = ("birealnet_small", 32, 2) if session.tiny else ("birealnet18", 224, 20)
    images = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, device=session.device)
    labels = torch.randint(0, 1000, (batch_size,), device=session.device)
    for is_timed in (True, False):
        torch.manual_seed(0)
        model: nn.Module = create_model(ModelConfig(name=network, num_classes=1000)).to(session.device)
        config = EngineConfig(precision="bf16")
        plain, schedules = build_optimizer(model, OptimConfig(), num_steps=1000)
        optimizer = shard(plain, config, 1)
        options = deepspeed_options(config, global_batch_size=batch_size, num_replicas=1, world_size=1)
        options["timers"] = {"throughput": {"enabled": is_timed, "synchronized": is_timed}}
        engine = create_engine(model, optimizer, schedules, options, session.device)
        engine.train()

        def step(engine: Any = engine, optimizer: Any = optimizer) -> None:
            logits = engine(normalize(images, _MEAN, _STD))
            backward(engine, nn.functional.cross_entropy(logits.float(), labels), optimizer)
            engine.step()

        seconds_per_call(step, 2 if session.tiny else 6, session.device)
        seconds = seconds_per_call(step, num_steps, session.device)
        facts = {"throughput_timer": is_timed, "ms": seconds * 1e3, "images_per_second": batch_size / seconds}
        session.add(f"DeepSpeed engine, {network}", batch_size=batch_size, **facts)
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.close()
        engine.destroy()
