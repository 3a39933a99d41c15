"""Train with the sharded optimizer in your own loop.

torchrun --nproc_per_node 2 docs/examples/sharded_optimizer.py
"""

import torch
import torch.distributed as dist
from torch import nn

from bitfleet.models import QuantLinear, ste_sign
from bitfleet.optim import HyperparameterScheduler, OptimConfig, ShardedOptimizer, build_optimizer, constant, linear

NUM_STEPS, BATCH_SIZE = 300, 64


def main() -> None:
    """Learn which half of 32 bits has more ones."""
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(dist.get_rank())  # different data per rank; all take rank 0's weights
    model = nn.Sequential(
        QuantLinear(32, 512, input_quantizer=None),  # weights of +-1, marked as binary
        nn.BatchNorm1d(512),
        QuantLinear(512, 64, input_quantizer=ste_sign),
        nn.BatchNorm1d(64),
        nn.Linear(64, 2),
    )
    config = OptimConfig(gamma=linear(1e-2, 1e-4), sigma=constant(1e-3), threshold=constant(1e-6), lr=constant(1e-2))
    plain, schedules = build_optimizer(model, config, num_steps=NUM_STEPS)  # or Bop2ndOrder(params, gamma=..., ...)
    optimizer = ShardedOptimizer(plain)  # no DistributedDataParallel: it reduces the gradients itself
    scheduler = HyperparameterScheduler(optimizer, schedules)
    for step in range(NUM_STEPS):
        bits = torch.randint(0, 2, (BATCH_SIZE, 32), generator=generator).float() * 2 - 1
        labels = (bits[:, :16].sum(1) > bits[:, 16:].sum(1)).long()
        logits = model(bits)
        nn.functional.cross_entropy(logits, labels).backward()  # gradients leave as buckets fill up
        optimizer.step()
        scheduler.step()
        if step % 100 == 99 and dist.get_rank() == 0:
            print(f"step {step + 1} accuracy {(logits.argmax(1) == labels).float().mean():.0%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
