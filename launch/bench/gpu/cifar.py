"""Part "cifar" of `bitfleet bench gpu`: BinaryNet on CIFAR-10 through the real trainer, as many epochs as the time allows."""

import functools
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bitfleet.launch.bench.clock import seconds_per_call
from bitfleet.launch.bench.gpu.rows import Row, read_rows
from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.gpu.trainer import tiny_fields, variants_of, varied, write_random_images
from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.metrics import Accuracy
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.run.stop import STOP_FILE
from bitfleet.trainer.trainer import Trainer

EPOCH = "epoch"
_RESERVED_SECONDS = 12.0
"""Building the trainer once more, the last save and the picture."""
_VALIDATION_COST = 0.5
"""Of a validation image, in training images; a guess, to choose the number of epochs."""


def measure_cifar(session: Session, config: TrainConfig, root: Path | None, ranks: Ranks) -> None:
    """Train `config` for as many epochs as fit, write down the accuracy after each, and draw them.

    The schedules have the length of these epochs, so a short run ends with the hyperparameters of a long one.

    Args:
        session: of the benchmark.
        config: the run; its length is chosen here.
        root: class folders of CIFAR-10; random images where it is None, for a dry run.
        ranks: this process alone.
    """
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as name:
        folder = Path(name)
        root = root or write_random_images(folder / "images", num_classes=10, train=2, val=1, size=32)
        is_jpeg = next(root.glob("train/*/*.jp*g"), None) is not None
        session.add("data", root=str(root), files="JPEG, not CIFAR-10's own pixels" if is_jpeg else "not JPEG")
        fields = tiny_fields(config) if session.tiny else {}
        for number, variant in enumerate(variants_of(session.device)):
            make = functools.partial(varied, config, variant, folder / f"timed{number}", root, **fields)
            seconds = session.attempt(f"loader {variant.loader}", _seconds_per_epoch, session, make, ranks)
            if seconds is not None:
                epochs = _epochs_that_fit(session, seconds, config.epochs)
                facts = {"loader": variant.loader, "cuda_graph": variant.cuda_graph}
                session.add("epochs that fit", **facts, seconds_per_epoch=seconds, epochs=epochs)
                _train(session, varied(config, variant, folder / "run", root, epochs=epochs, **fields), ranks)
                session.attempt("picture", _draw, session)
                return


def _seconds_per_epoch(session: Session, make: Callable[[], TrainConfig], ranks: Ranks) -> float:
    """Of training and validation, from a few steps."""
    warm_up, timed = (1, 1) if session.tiny else (30, 100)
    config = make()
    trainer = Trainer(config, ranks, session.device)
    trainer.start()
    try:
        seconds_per_call(trainer.advance, warm_up, session.device)
        seconds = seconds_per_call(trainer.advance, timed, session.device)
    finally:
        _close(trainer)
    num_images = len(trainer.dataset.train) + _VALIDATION_COST * len(trainer.dataset.val)
    return seconds * num_images / config.global_batch_size


def _epochs_that_fit(session: Session, seconds_per_epoch: float, most: int) -> int:
    if session.tiny:
        return 2
    return max(1, min(most, int((session.seconds_left() - _RESERVED_SECONDS) / seconds_per_epoch)))


def _train(session: Session, config: TrainConfig, ranks: Ranks) -> None:
    trainer = Trainer(config, ranks, session.device)
    start = time.monotonic()

    def say(step: int, accuracy: Accuracy) -> str:
        epoch = step // trainer.loader.steps_per_epoch
        session.add(
            EPOCH,
            epoch=epoch,
            of=config.epochs,
            top1=accuracy.top1,
            validation_loss=accuracy.loss,
            seconds=time.monotonic() - start,
        )
        return ""

    trainer.after_validation = say
    # The epochs that fit are a guess: a run that takes longer is asked to stop, as a user would.
    too_long = threading.Timer(
        max(session.seconds_left() - _RESERVED_SECONDS / 2, 1.0), (trainer.folder.path / STOP_FILE).touch
    )
    too_long.start()
    try:
        trainer.train()
    finally:
        too_long.cancel()
    seconds = time.monotonic() - start
    session.add(
        "run", steps=trainer.step, of=trainer.num_steps, seconds=seconds, stopped_by=trainer.stopped_by or "the end"
    )


def _close(trainer: Trainer) -> None:
    trainer.stop()
    if isinstance(trainer.sharded, ShardedOptimizer):
        trainer.sharded.close()


def _draw(session: Session) -> None:
    picture = session.output.with_suffix(".cifar.png")
    rows = [row for row in read_rows(session.output) if row["part"] == session.part and row["what"] == EPOCH]
    draw_accuracy(rows, picture)
    session.add("picture", file=str(picture))


def draw_accuracy(rows: Sequence[Row], picture: Path) -> None:
    """Draw the validation accuracy over the epochs into the PNG file `picture`.

    Args:
        rows: results called EPOCH.
        picture: the file.
    """
    from matplotlib.figure import Figure  # a bare machine may lack it

    figure = Figure(figsize=(7, 4), constrained_layout=True)
    axis = figure.subplots()
    axis.plot([row["epoch"] for row in rows], [100 * row["top1"] for row in rows], marker=".")
    axis.set_xlabel(f"epoch of {rows[-1]['of']}")
    axis.set_ylabel("top-1 of the validation images, %")
    axis.grid(alpha=0.25)
    figure.savefig(picture, dpi=90)
