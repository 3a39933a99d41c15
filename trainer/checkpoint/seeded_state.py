"""The optimizer's state of a run that begins with weights from a file: seeded by gradients of its first steps."""

import torch
from torch import Tensor, nn

from bitfleet.optim import Seeding, ShardedOptimizer
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import TrainLoader, normalize
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.engine.engine import autocast, scaled_loss

SEEDING_STEPS = 8
"""Steps whose gradients seed an optimizer's state: enough to know the size of a gradient within a third."""
MAX_SEEDING_TRIES = 40
"""Of steps whose gradients may not be finite: fp16 finds its loss scale in 16."""


def seed_state(
    model: nn.Module,
    sharded: ShardedOptimizer,
    statistics: RunningStatistics,
    loader: TrainLoader,
    config: TrainConfig,
    *,
    num_micro_batches: int,
    num_steps: int,
) -> str:
    """Fill the state of a new optimizer for weights from a file, by gradients of the run's first steps; every rank calls this.

    Args:
        model: with the weights; they stay, and so do its BatchNorms' running statistics.
        sharded: its optimizer, before the first step.
        statistics: of the model.
        loader: its first batches are read; the run reads them again.
        config: the run.
        num_micro_batches: of this rank, per step.
        num_steps: of the run.

    Returns:
        What was done, in words. Where no gradient is finite nothing is: the run will skip all its steps, and say why.
    """
    seeding = Seeding(sharded, inertia=config.optim.init_inertia, num_steps=num_steps)
    batches = loader.batches()
    device = next(model.parameters()).device
    model.train()
    for _ in range(MAX_SEEDING_TRIES):
        if seeding.num_taken == SEEDING_STEPS:
            break
        for _ in range(num_micro_batches):
            images, labels = next(batches)
            with statistics.replica():
                with autocast(device, config.engine.precision):
                    logits: Tensor = model(normalize(images, config.data.mean, config.data.std))
                loss = nn.functional.cross_entropy(logits.float(), labels)
                torch.autograd.backward(scaled_loss(loss, sharded))
        seeding.take()
        statistics.end_step(updated=False)
    start = f"began from {config.init}: the state of the optimizer was"
    if seeding.num_taken == 0:
        return f"{start} not seeded, since no gradient of {MAX_SEEDING_TRIES} steps is finite"
    seeding.finish()
    number, inertia = seeding.num_taken, config.optim.init_inertia
    return f"{start} seeded with the gradients of {number} steps (optim.init_inertia {inertia:g})"
