"""Compare training loops: with a bare torch loop, with and without diagnostics or flip journal."""

import contextlib
import dataclasses
import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitfleet.launch.bench.command import Diagnostics, Journal, Train
from bitfleet.launch.bench.results import Row, titled
from bitfleet.launch.bench.timing import Turn, interleave, ratio, ratios, take_turn
from bitfleet.launch.bench.training import TrainingStep
from bitfleet.launch.journal.reader import read_parts
from bitfleet.models import compile_network, create_model
from bitfleet.optim import ShardedOptimizer, is_binary
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.engine.engine import autocast
from bitfleet.trainer.journal.config import JournalConfig
from bitfleet.trainer.journal.format import FRAME_BYTES, SIGNS, encode
from bitfleet.trainer.journal.writer import open_journal
from bitfleet.trainer.ranks.collectives import Ranks, all_reduce_number, barrier, broadcast_object
from bitfleet.trainer.trainer import Trainer

FLIP_RATIOS = (0.5, 0.1, 0.03, 0.01, 0.004)
NUM_WEIGHTS = 10_985_472
"""Binary weights of Bi-Real Net 18."""


@contextlib.contextmanager
def started(
    config: TrainConfig, ranks: Ranks, device: torch.device, num_steps: int = 0, **fields: Any
) -> Iterator[Trainer]:
    """Start the run `config` with other `fields`, in a temporary folder; every rank calls this.

    Raises:
        ValueError: the run has fewer than `num_steps` steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(broadcast_object(folder)) / "run"
        trainer = Trainer(dataclasses.replace(config, run_dir=run_dir, resume=None, **fields), ranks, device)
        if num_steps > trainer.num_steps:
            raise ValueError(
                f"{config.name} has {trainer.num_steps:,} steps, the benchmark makes {num_steps:,}: use fewer --steps "
                "or --rounds"
            )
        trainer.start()
        try:
            yield trainer
        finally:
            trainer.stop()
            if isinstance(trainer.sharded, ShardedOptimizer):
                trainer.sharded.close()
        barrier()


def bare_steps(trainer: Trainer, config: TrainConfig) -> Iterator[None]:
    """Make one step per `next` of the loop that one would write without bitfleet.

    The same network and plain optimizer, DistributedDataParallel on more than one rank; images
    decoded and normalized before the first step, no augmentation, no metrics.
    """
    device = trainer.device
    loaded = [next(trainer.batches) for _ in range(min(trainer.loader.steps_per_epoch, 64))]
    batches = [
        (normalize(images.to(device), config.data.mean, config.data.std), labels.to(device))
        for images, labels in loaded
    ]
    model = create_model(config.model).to(device)
    if trainer.compiled:
        compile_network(model)
    context = autocast(device, trainer.config.engine.precision)
    step = TrainingStep("ddp", model, batches[0][0], trainer.ranks.world_size, optim=config.optim, context=context)
    for step.images, step.labels in itertools.cycle(batches):
        step()
        yield


def bench_train(options: Train, config: TrainConfig, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Compare the whole loop, with augmentation, DeepSpeed and logging, with `bare_steps`."""
    with started(config, ranks, device, num_replicas=None) as trainer:
        bare = bare_steps(trainer, config)
        steps: dict[str, Callable[[], object]] = {"bitfleet": trainer.advance, "bare torch loop": lambda: next(bare)}
        contenders = {title: functools.partial(take_turn, step, options.steps, device) for title, step in steps.items()}
        turns = interleave(contenders, options.rounds)
    seconds = {title: [turn.seconds for turn in values] for title, values in turns.items()}
    rows = [
        {
            "what": title,
            "images/s": config.global_batch_size / statistics.median(values),
            "ratio": ratio(seconds["bare torch loop"], values),
        }
        for title, values in seconds.items()
    ]
    yield titled(f"{config.name} on {ranks.world_size} ranks ({device.type}), median of {options.rounds} rounds", rows)


def compare_turns(without: Sequence[Turn], with_it: Sequence[Turn]) -> list[Row]:
    """Return rows of ms per step and CPU ms, without and with something, and their ratio."""
    rows = []
    for title, name in (("ms", "seconds"), ("CPU ms of rank 0", "cpu_seconds")):
        first, second = ([1e3 * getattr(turn, name) for turn in turns] for turns in (without, with_it))
        quotients = ratios(second, first)
        low, middle, high = statistics.quantiles(quotients, method="inclusive") if len(quotients) > 1 else 3 * quotients
        figures = {"without": statistics.median(first), "with": statistics.median(second), "ratio": middle}
        rows.append({"what": f"{title} per step", **figures, "lower quartile": low, "upper": high})
    return rows


def bench_diagnostics(options: Diagnostics, config: TrainConfig, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Compare the loop with and without metrics.diagnostics; reports and their files are in both.

    Raises:
        ValueError: --steps is not a multiple of metrics.every_steps, so that turns would not report
            equally often; or the run is too short.
    """
    every = config.metrics.every_steps
    if options.steps % every:
        raise ValueError(f"--steps is {options.steps}, expected a multiple of metrics.every_steps, which is {every}")
    without, with_them = (dataclasses.replace(config.metrics, diagnostics=diagnostics) for diagnostics in (False, True))
    num_steps = (options.rounds + 1) * options.steps
    with (
        started(config, ranks, device, num_steps, metrics=without) as plain,
        started(config, ranks, device, num_steps, metrics=with_them) as measured,
    ):
        trainers = {"without": plain, "with": measured}
        turns = interleave(
            {
                title: functools.partial(take_turn, each.advance, options.steps, device)
                for title, each in trainers.items()
            },
            options.rounds,
        )
    yield titled(
        f"{config.name}, {config.model.name}, {ranks.world_size} ranks, a report every {every} steps; "
        f"medians of {options.rounds} rounds",
        compare_turns(turns["without"], turns["with"]),
    )


def bench_journal(options: Journal, config: TrainConfig, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Compare steps with and without a flip journal, and encode random flips.

    Steps with a journal end when it is flushed to the disk. They are `Trainer.train_step`, without
    logging steps, which might fall on one side more often.
    """
    num_steps = 2 * (options.rounds + 1) * options.steps
    with started(config, ranks, device, num_steps, journal=JournalConfig()) as trainer:
        run = trainer.folder.path

        def with_journal() -> Turn:
            journal = open_journal(True, run, ranks, trainer.sharded)
            assert journal is not None
            turn = take_turn(trainer.train_step, options.steps, device, finish=journal.flush)
            journal.close()
            return turn

        plain: Callable[[], Turn] = functools.partial(take_turn, trainer.train_step, options.steps, device)
        turns = interleave({"without": plain, "with": with_journal}, options.rounds)
        barrier()
        files = [file for part in read_parts(run)[1:] for file in part.files if file.layout.rank == ranks.rank]
        frames = [frame for file in files for frame in file.frames if frame.kind != SIGNS]
        measured_steps = options.rounds * options.steps
        flips = all_reduce_number(sum(frame.num_flips for frame in frames)) / measured_steps
        num_bytes = all_reduce_number(sum(FRAME_BYTES + frame.length for frame in frames)) / measured_steps
        num_weights = sum(param.numel() for param in trainer.model.parameters() if is_binary(param))
    yield titled(
        f"{config.name} on {ranks.world_size} ranks, {num_weights:,} binary weights, median of {options.rounds} "
        f"rounds of {options.steps} steps",
        compare_turns(turns["without"], turns["with"]),
    )
    yield f"  flips per step {flips:,.0f} ({flips / num_weights:.4%}), bytes per step {num_bytes:,.0f}"
    if ranks.is_main:
        yield titled(f"random flips of {NUM_WEIGHTS:,} weights", encode_flips())


def encode_flips(num_weights: int = NUM_WEIGHTS, flip_ratios: Sequence[float] = FLIP_RATIOS) -> list[Row]:
    """Encode a step of independent flips of `num_weights` weights, a multiple of 8."""
    generator = np.random.default_rng(0)
    rows = []
    for flip_ratio in flip_ratios:
        flips = np.packbits(generator.random(num_weights) < flip_ratio, bitorder="little")
        rows.append({"what": f"{flip_ratio:.2%} flip", "bytes per step": len(encode(1, flips))})
    return rows
