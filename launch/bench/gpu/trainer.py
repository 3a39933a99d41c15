"""BinaryNet's run on one rank and one GPU: ms per step, and as many epochs as there is time for."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from bitfleet.configs import load_config
from bitfleet.launch.bench.loops import started
from bitfleet.launch.bench.photos import write_small_images
from bitfleet.launch.bench.results import Session, read_rows
from bitfleet.launch.bench.timing import seconds_per_call
from bitfleet.launch.job import job
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import open_dataset
from bitfleet.trainer.metrics import Accuracy
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.trainer import Trainer

Loader = Literal["dali", "torch", "memory"]
SECONDS_PER_STEP = 0.003
"""Assumed for BinaryNet, if the part "trainer" has not measured it."""
SHARE_FOR_EPOCHS = 0.75
"""Part of the time left that steps may take; validation, saves and the start take the rest."""


def varied(config: TrainConfig, loader: Loader, *, cuda_graph: bool = False) -> TrainConfig:
    """Return `config` with another way to get images and to launch a step."""
    data = dataclasses.replace(config.data, loader=loader)
    return dataclasses.replace(config, data=data, engine=dataclasses.replace(config.engine, cuda_graph=cuda_graph))


@contextmanager
def _binarynet(session: Session) -> Iterator[tuple[Ranks, TrainConfig]]:
    """Give the only rank of a job and BinaryNet's run; without --cifar its images are random."""
    with job("auto") as (ranks, _), tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as folder:
        config = load_config("binarynet_cifar10")
        root = session.cifar or write_small_images(Path(folder) / "images", 20 if session.tiny else 2000)
        data = dataclasses.replace(config.data, root=str(root))
        config = dataclasses.replace(config, data=data, run_dir=Path(folder) / "run", resume=None)
        if session.tiny:
            metrics = dataclasses.replace(config.metrics, every_steps=2)
            config = dataclasses.replace(config, global_batch_size=10, metrics=metrics)
        yield ranks, config


def measure_trainer(session: Session) -> None:
    """Write down ms per step of BinaryNet, with every way to get images and to launch a step."""
    warm_up, timed = (1, 1) if session.tiny else (30, 200)

    def measure(what: str, config: TrainConfig, ranks: Ranks) -> None:
        with started(config, ranks, session.device) as trainer:
            for _ in range(warm_up):
                trainer.advance()  # a graph of a logging step is captured when the first one comes
            seconds = seconds_per_call(trainer.advance, timed, session.device)
        session.add("step", run=what, ms=seconds * 1e3, images_per_second=config.global_batch_size / seconds)

    loaders: list[tuple[Loader, bool]] = [("memory", True), ("memory", False), ("torch", False)]
    with _binarynet(session) as (ranks, config):
        for loader, cuda_graph in loaders if session.is_cuda else loaders[1:]:
            what = f"loader {loader}{', CUDA graph' * cuda_graph}"
            run = varied(config, loader, cuda_graph=cuda_graph)
            session.attempt(what, measure, what, run, ranks, needs_seconds=15.0)


def measure_cifar(session: Session) -> None:
    """Train BinaryNet on CIFAR-10, and write down the accuracy after every epoch.

    The schedules have the length of these epochs, so a short run ends with the hyperparameters of a
    long one.
    """
    if session.cifar is None and not session.tiny:
        session.add("BinaryNet", skipped="--cifar names no class folders of CIFAR-10")
        return
    with _binarynet(session) as (ranks, config):
        config = varied(config, "memory", cuda_graph=session.is_cuda)
        steps = [row["ms"] for row in read_rows(Path(session.output)) if row["what"] == "step" and "ms" in row]
        seconds_per_step = min(steps) / 1e3 if steps else SECONDS_PER_STEP
        num_images = len(open_dataset(config.data).train)
        seconds_per_epoch = seconds_per_step * num_images / config.global_batch_size
        epochs = 2 if session.tiny else int(SHARE_FOR_EPOCHS * session.seconds_left() / seconds_per_epoch)
        config = dataclasses.replace(config, epochs=min(max(epochs, 1), config.epochs))
        trainer = Trainer(config, ranks, session.device)
        start = time.monotonic()

        def after_validation(step: int, accuracy: Accuracy) -> str:
            epoch, seconds = step // trainer.loader.steps_per_epoch, time.monotonic() - start
            session.add("epoch", epoch=epoch, of=config.epochs, top1=accuracy.top1, seconds=seconds)
            return ""

        trainer.after_validation = after_validation
        trainer.train()
