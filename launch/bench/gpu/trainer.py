"""Parts "trainer" and "cifar" of `bitfleet bench gpu`: the real Trainer on one rank."""

import dataclasses
import functools
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bitfleet.configs import load_config
from bitfleet.launch.bench.gpu.session import Row, Session, read_rows
from bitfleet.launch.bench.gpu.waits import PageableCopies, Places, host_waits
from bitfleet.launch.bench.loops import started
from bitfleet.launch.bench.photos import write_small_images
from bitfleet.launch.bench.timing import seconds_per_call, synchronize
from bitfleet.launch.bench.training import MEAN, STD, RankStep
from bitfleet.launch.job import job
from bitfleet.models import ModelConfig, create_model
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.data.fashion import SUBSET_ROOT
from bitfleet.trainer.metrics import Accuracy
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.run.stop import STOP_FILE
from bitfleet.trainer.trainer import Trainer

Loader = Literal["dali", "torch", "memory"]
_RESERVED_SECONDS = 12.0
"""Time for building the trainer once more, the last save and the picture."""
_VALIDATION_COST = 0.5
"""Cost of a validation image in training images; a guess, to choose the number of epochs."""


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


def _tiny_fields(session: Session, config: TrainConfig) -> dict[str, Any]:
    metrics = dataclasses.replace(config.metrics, every_steps=2)
    return {"global_batch_size": 10, "metrics": metrics} if session.tiny else {}


def _cifar_or_random(session: Session, folder: Path) -> Path:
    """The folder of --cifar; without it class folders of random images."""
    return Path(session.cifar) if session.cifar else write_small_images(folder, 20 if session.tiny else 2000)


def measure_trainer(session: Session) -> None:
    """Write down step time and waits of two configurations, then the cost of DeepSpeed's timer."""
    with job("auto") as (ranks, _), tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as name:
        folder = Path(name)
        root = _cifar_or_random(session, folder / "images")
        for config in (load_config("binarynet_cifar10"), load_config("fashion_quickstart")):
            fields = _tiny_fields(session, config)
            for variant in variants_of(session.device):
                what = f"{config.name}, loader {variant.loader}{', CUDA graph' * variant.cuda_graph}"
                make = functools.partial(varied, config, variant, folder / "run", root, **fields)
                session.attempt(what, _measure_run, session, what, make, ranks, needs_seconds=25.0)
        for batch_size in (2,) if session.tiny else (64, 256):
            session.attempt("DeepSpeed's timer", _measure_timer, session, batch_size, ranks, needs_seconds=25.0)


def _measure_run(session: Session, what: str, make: Callable[[], TrainConfig], ranks: Ranks) -> None:
    warm_up, counted, timed = (1, 1, 1) if session.tiny else (30, 10, 200)
    start = time.perf_counter()
    with started(make(), ranks, session.device) as trainer:
        config = trainer.config
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
        if not config.engine.cuda_graph:  # a replay passes by the dispatcher
            session.attempt("pageable copies per step", _measure_copies, session, what, trainer, counted)


def _measure_syncs(session: Session, what: str, trainer: Trainer, num_steps: int) -> None:
    with host_waits(session.device) as waits:
        for _ in range(num_steps):
            trainer.train_step()
            trainer.checkpoints.saver.check()
    session.add("host syncs per step", run=what, **_counts(waits.syncs, num_steps, waits.events))
    while (trainer.step + 1) % trainer.config.metrics.every_steps:
        trainer.train_step()
    with host_waits(session.device) as waits:
        trainer.advance()
    session.add("host syncs of a logging step", run=what, **_counts(waits.syncs, 1, waits.events))


def _measure_copies(session: Session, what: str, trainer: Trainer, num_steps: int) -> None:
    # A compiled function refuses to run under a mode that sees every operator.
    with torch.compiler.set_stance("force_eager"), PageableCopies() as copies:
        for _ in range(num_steps):
            trainer.train_step()
    session.add("pageable copies per step", run=what, **_counts(copies.places, num_steps))


def _counts(places: Places, num_steps: int, events: Places | None = None) -> dict[str, Any]:
    def per_step(counter: Places) -> dict[str, float]:
        return {place: count / num_steps for place, count in counter.most_common(8)}

    counts: dict[str, Any] = {"total": places.total() / num_steps, "places": per_step(places)}
    return counts if events is None else counts | {"waits_for_an_event": per_step(events)}


def _measure_timer(session: Session, batch_size: int, ranks: Ranks) -> None:
    """Time Bi-Real Net 18 in the DeepSpeed engine, with its throughput timer and without."""
    network, size, num_steps = ("birealnet_small", 32, 2) if session.tiny else ("birealnet18", 224, 20)
    images = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, device=session.device)
    for is_timed in (True, False):
        torch.manual_seed(0)
        model = create_model(ModelConfig(name=network, num_classes=1000))
        timers = {"throughput": {"enabled": is_timed, "synchronized": is_timed}}
        step = RankStep("bits", model, normalize(images, MEAN, STD), ranks, precision="bf16", timers=timers)
        step.engine.train()
        seconds_per_call(step, 2 if session.tiny else 6, session.device)
        seconds = seconds_per_call(step, num_steps, session.device)
        speed = {"ms": seconds * 1e3, "images_per_second": batch_size / seconds}
        session.add(f"DeepSpeed engine, {network}", batch_size=batch_size, throughput_timer=is_timed, **speed)
        step.close()


def measure_cifar(session: Session) -> None:
    """Train BinaryNet on CIFAR-10 for as many epochs as fit, and draw the accuracy.

    The schedules have the length of these epochs, so a short run ends with the hyperparameters of a
    long one.
    """
    if session.cifar is None and not session.tiny:
        session.add("BinaryNet", skipped="--cifar names no class folders of CIFAR-10")
        return
    with job("auto") as (ranks, _), tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as name:
        folder = Path(name)
        config = load_config("binarynet_cifar10")
        root = _cifar_or_random(session, folder / "images")
        is_jpeg = next(root.glob("train/*/*.jp*g"), None) is not None
        session.add("data", root=str(root), files="JPEG, not CIFAR-10's own pixels" if is_jpeg else "not JPEG")
        fields = _tiny_fields(session, config)
        for variant in variants_of(session.device):
            make = functools.partial(varied, config, variant, folder / "timed", root, **fields)
            seconds = session.attempt(f"loader {variant.loader}", _seconds_per_epoch, session, make, ranks)
            if seconds is not None:
                epochs = int((session.seconds_left() - _RESERVED_SECONDS) / seconds)
                epochs = 2 if session.tiny else max(1, min(config.epochs, epochs))
                session.add("epochs that fit", **variant._asdict(), seconds_per_epoch=seconds, epochs=epochs)
                _train(session, varied(config, variant, folder / "run", root, epochs=epochs, **fields), ranks)
                session.attempt("picture", _draw, session)
                return


def _seconds_per_epoch(session: Session, make: Callable[[], TrainConfig], ranks: Ranks) -> float:
    """Estimate the time of training and validation from a few steps."""
    warm_up, timed = (1, 1) if session.tiny else (30, 100)
    with started(make(), ranks, session.device) as trainer:
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
    # The epochs that fit are a guess: a run that takes longer is asked to stop, as a user would.
    longest = max(session.seconds_left() - _RESERVED_SECONDS / 2, 1.0)
    stop = threading.Timer(longest, (trainer.folder.path / STOP_FILE).touch)
    stop.start()
    try:
        trainer.train()
    finally:
        stop.cancel()
    steps = {"steps": trainer.step, "of": trainer.num_steps, "stopped_by": trainer.stopped_by or "the end"}
    session.add("run", **steps, seconds=time.monotonic() - start)


def _draw(session: Session) -> None:
    rows = [row for row in read_rows(Path(session.output)) if (row["part"], row["what"]) == (session.part, "epoch")]
    picture = Path(session.output).with_suffix(".cifar.png")
    draw_accuracy(rows, picture)
    session.add("picture", file=str(picture))


def draw_accuracy(rows: Sequence[Row], picture: Path) -> None:
    """Draw the validation accuracy of results called "epoch" into a PNG file."""
    from matplotlib.figure import Figure  # a bare machine may lack it

    figure = Figure(figsize=(7, 4), constrained_layout=True)
    axis = figure.subplots()
    axis.plot([row["epoch"] for row in rows], [100 * row["top1"] for row in rows], marker=".")
    axis.set_xlabel(f"epoch of {rows[-1]['of']}")
    axis.set_ylabel("top-1 of the validation images, %")
    axis.grid(alpha=0.25)
    figure.savefig(picture, dpi=90)
