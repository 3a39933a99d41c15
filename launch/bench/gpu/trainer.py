"""The real Trainer on one rank and one GPU: ms per step, and a run in the time that is left."""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bitfleet.configs import load_config
from bitfleet.launch.bench.loops import started
from bitfleet.launch.bench.photos import write_small_images
from bitfleet.launch.bench.results import Session
from bitfleet.launch.bench.timing import seconds_per_call, synchronize
from bitfleet.launch.job import job
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data.fashion import SUBSET_ROOT
from bitfleet.trainer.metrics import Accuracy
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.trainer import Trainer

Loader = Literal["dali", "torch", "memory"]
_VALIDATION_COST = 0.5
"""Cost of a validation image in training images; a guess, to choose the number of epochs."""
_SHARE_FOR_EPOCHS = 0.85
"""Of the time left; the rest is for building the trainer once more and for a bad guess."""


class Variant(NamedTuple):
    """A way to get images and to launch a step."""

    loader: Loader
    cuda_graph: bool = False


VARIANTS = (Variant("memory", cuda_graph=True), Variant("memory"), Variant("torch"))
"""The fastest first."""


def variants_of(device: torch.device) -> Sequence[Variant]:
    """Return those of VARIANTS that `device` can have: a CPU has no CUDA graph."""
    return [variant for variant in VARIANTS if device.type == "cuda" or not variant.cuda_graph]


def varied(config: TrainConfig, variant: Variant, run_dir: Path, root: Path, **fields: Any) -> TrainConfig:
    """Return `config` as `variant`; it reads `root` unless its images are embedded.

    Raises:
        ValueError: the fields contradict each other.
    """
    images = config.data.root if config.data.root == SUBSET_ROOT else str(root)
    fields["data"] = dataclasses.replace(config.data, loader=variant.loader, root=images)
    fields["engine"] = dataclasses.replace(config.engine, cuda_graph=variant.cuda_graph)
    return dataclasses.replace(config, run_dir=run_dir, resume=None, **fields)


@contextmanager
def _job(session: Session) -> Iterator[tuple[Ranks, Callable[..., TrainConfig]]]:
    """Give the only rank of a job, and a function that makes a configuration `varied`.

    The images are those of --cifar; without it they are random.
    """
    with job("auto") as (ranks, _), tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as name:
        folder = Path(name)
        root = session.cifar or write_small_images(folder / "images", 20 if session.tiny else 2000)

        def make(config: TrainConfig, variant: Variant, **fields: Any) -> TrainConfig:
            if session.tiny:
                fields |= {"global_batch_size": 10, "metrics": dataclasses.replace(config.metrics, every_steps=2)}
            return varied(config, variant, folder / "run", Path(root), **fields)

        yield ranks, make


def measure_steps(session: Session) -> None:
    """Write down ms per step of two configurations, with every loader."""
    warm_up, timed = (1, 1) if session.tiny else (30, 200)

    def measure(what: str, config: TrainConfig, ranks: Ranks) -> None:
        start = time.perf_counter()
        with started(config, ranks, session.device) as trainer:
            for _ in range(warm_up):
                trainer.advance()  # a graph of a logging step is captured when the first one comes
            synchronize(session.device)
            seconds_to_start = time.perf_counter() - start
            seconds = seconds_per_call(trainer.advance, timed, session.device)
        rate = config.global_batch_size / seconds
        session.add("step", run=what, ms=seconds * 1e3, images_per_second=rate, seconds_to_start=seconds_to_start)

    with _job(session) as (ranks, make):
        for name in ("binarynet_cifar10", "fashion_quickstart"):
            for variant in variants_of(session.device):
                what = f"{name}, loader {variant.loader}{', CUDA graph' * variant.cuda_graph}"
                config = make(load_config(name), variant)
                session.attempt(what, measure, what, config, ranks, needs_seconds=15.0)


def train_epochs_that_fit(session: Session) -> None:
    """Train BinaryNet on CIFAR-10 with the fastest variant that works.

    The schedules have the length of these epochs, so a short run ends with the hyperparameters of a
    long one.
    """
    config = load_config("binarynet_cifar10")
    with _job(session) as (ranks, make):
        for variant in variants_of(session.device):
            create = functools.partial(make, config, variant)
            seconds = session.attempt(f"loader {variant.loader}", _seconds_per_epoch, session, create(), ranks)
            if seconds is not None:
                epochs = int(_SHARE_FOR_EPOCHS * session.seconds_left() / seconds)
                epochs = 2 if session.tiny else max(1, min(config.epochs, epochs))
                session.add("epochs that fit", **variant._asdict(), seconds_per_epoch=seconds, epochs=epochs)
                _train(session, create(epochs=epochs), ranks)
                return


def _seconds_per_epoch(session: Session, config: TrainConfig, ranks: Ranks) -> float:
    """Estimate the time of training and validation from a few steps."""
    warm_up, timed = (1, 1) if session.tiny else (30, 100)
    with started(config, ranks, session.device) as trainer:
        seconds_per_call(trainer.advance, warm_up, session.device)
        seconds = seconds_per_call(trainer.advance, timed, session.device)
    num_images = len(trainer.dataset.train) + _VALIDATION_COST * len(trainer.dataset.val)
    return seconds * num_images / trainer.config.global_batch_size


def _train(session: Session, config: TrainConfig, ranks: Ranks) -> None:
    trainer = Trainer(config, ranks, session.device)
    start = time.monotonic()

    def after_validation(step: int, accuracy: Accuracy) -> str:
        epoch, seconds = step // trainer.loader.steps_per_epoch, time.monotonic() - start
        quality = {"top1": accuracy.top1, "validation_loss": accuracy.loss}
        session.add("epoch", epoch=epoch, of=config.epochs, **quality, seconds=seconds)
        return ""

    trainer.after_validation = after_validation
    trainer.train()
