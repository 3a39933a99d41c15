"""What bitfleet costs: its step loop against a bare torch loop on data in memory, interleaved in the same processes."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitfleet.models import compile_network, create_model
from bitfleet.optim import HyperparameterScheduler, build_optimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.engine.engine import autocast
from bitfleet.trainer.ranks.collectives import Ranks, barrier, from_first_rank
from bitfleet.trainer.trainer import Trainer


class Comparison(NamedTuple):
    """Images per second of both loops, over all ranks, one value a round."""

    bitfleet: list[float]
    bare: list[float]

    @property
    def ratio(self) -> float:
        """Median over the rounds of bitfleet / bare."""
        return statistics.median(a / b for a, b in zip(self.bitfleet, self.bare, strict=True))


def bare_steps(trainer: Trainer, config: TrainConfig) -> Iterator[None]:
    """The loop that one would write without bitfleet, a step each `next`.

    The same network and plain optimizer, DistributedDataParallel on more than one rank; images decoded and normalised before the
    first step, no augmentation, no metrics.
    """
    held = [next(trainer.batches) for _ in range(min(trainer.loader.steps_per_epoch, 64))]
    batches = [
        (normalize(images.to(trainer.device), config.data.mean, config.data.std), labels.to(trainer.device))
        for images, labels in held
    ]
    model: nn.Module = create_model(config.model).to(trainer.device)
    if trainer.compiled:
        compile_network(model)
    optimizer, schedules = build_optimizer(model, config.optim, num_steps=trainer.num_steps)
    scheduler = HyperparameterScheduler(optimizer, schedules)
    wrapped = DistributedDataParallel(model) if trainer.ranks.world_size > 1 else model
    while True:
        for images, labels in batches:
            with autocast(trainer.device, trainer.config.engine.precision):
                logits: Tensor = wrapped(images)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            scheduler.step()
            yield


def bench_train(
    config: TrainConfig, ranks: Ranks, device: torch.device, *, num_rounds: int, num_steps: int
) -> Comparison:
    """Measure both loops in turns, `num_steps` steps each, `num_rounds` times after a round that does not count.

    The bitfleet loop is the whole of it: DALI, augmentation, DeepSpeed, running statistics, logging steps and their files.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(from_first_rank(folder)) / "run"
        config = dataclasses.replace(config, run_dir=run_dir, resume=None, num_replicas=None)
        trainer = Trainer(config, ranks, device)
        trainer.start()
        bare = bare_steps(trainer, config)

        result = Comparison([], [])
        for count in range(num_rounds + 1):
            rates = [_rate(step, config, device, num_steps) for step in (trainer.advance, lambda: next(bare))]
            if count > 0:
                result.bitfleet.append(rates[0])
                result.bare.append(rates[1])
        trainer.stop()
        barrier()
    return result


def _rate(step: Callable[[], None], config: TrainConfig, device: torch.device, num_steps: int) -> float:
    barrier()
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    barrier()
    return num_steps * config.global_batch_size / (time.perf_counter() - start)
