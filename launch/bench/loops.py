"""Compare training loops: with a bare torch loop, with and without diagnostics or flip journal."""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bitfleet.launch.bench.command import Diagnostics, Journal, Train
from bitfleet.launch.bench.results import Row, compare, titled
from bitfleet.launch.bench.timing import interleave, take_turn
from bitfleet.launch.bench.training import TrainingStep
from bitfleet.models import compile_network, create_model
from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.engine.engine import autocast
from bitfleet.trainer.journal.config import JournalConfig
from bitfleet.trainer.journal.format import encode
from bitfleet.trainer.ranks.collectives import Ranks, barrier, broadcast_object
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
    model = create_model(dataclasses.replace(config.model, initial_weights="signs")).to(device)
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
    rates = {title: [config.global_batch_size / turn.seconds for turn in values] for title, values in turns.items()}
    yield titled(
        f"{config.name} on {ranks.world_size} ranks ({device.type}), median of {options.rounds} rounds (quartiles)",
        [compare("images/s", rates)],
    )


def _compare_runs(
    options: Diagnostics | Journal,
    config: TrainConfig,
    ranks: Ranks,
    device: torch.device,
    step: Literal["train_step", "advance"],
    **enabled: Any,
) -> str:
    """Compare `step` of a run without and with the fields `enabled`; files are flushed."""
    num_steps = (options.rounds + 1) * options.steps
    with (
        started(config, ranks, device, num_steps) as plain,
        started(config, ranks, device, num_steps, **enabled) as other,
    ):
        turns = interleave(
            {
                title: functools.partial(
                    take_turn, getattr(trainer, step), options.steps, device, finish=trainer.reports.flush
                )
                for title, trainer in {"with": other, "without": plain}.items()
            },
            options.rounds,
        )
    milliseconds = {title: [1e3 * turn.cpu_seconds for turn in values] for title, values in turns.items()}
    return titled(
        f"{config.name}, {config.model.name}, {ranks.world_size} ranks, median of {options.rounds} rounds of "
        f"{options.steps} steps (quartiles)",
        [compare("CPU ms of rank 0 per step", milliseconds)],
    )


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
    plain = dataclasses.replace(config, metrics=without)
    yield _compare_runs(options, plain, ranks, device, "advance", metrics=with_them)


def bench_journal(options: Journal, config: TrainConfig, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Compare steps, without logging, with and without a flip journal, and encode random flips."""
    plain = dataclasses.replace(config, journal=JournalConfig())
    yield _compare_runs(options, plain, ranks, device, "train_step", journal=JournalConfig(enabled=True))
    if ranks.is_main:
        yield titled(f"random flips of {NUM_WEIGHTS:,} weights", encode_flips())


def encode_flips(num_weights: int = NUM_WEIGHTS, flip_ratios: Sequence[float] = FLIP_RATIOS) -> list[Row]:
    """Encode a step of independent flips of `num_weights` weights, a multiple of 8."""
    draws = np.random.default_rng(0).random(num_weights)
    packed = {flip_ratio: np.packbits(draws < flip_ratio, bitorder="little") for flip_ratio in flip_ratios}
    return [{"what": f"{flip_ratio:.2%} flip", "bytes": len(encode(1, flips))} for flip_ratio, flips in packed.items()]
