"""Step time of the sharded optimizer against DistributedDataParallel and DeepSpeed's ZeRO-1, interleaved in one job.

The other two get the plain rule through torch.compile: in eager torch it would take most of their step.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, bop2ndorder_step_, build_optimizer
from bitfleet.optim.routed import Group, State, rule
from bitfleet.trainer.distributed import Ranks, barrier
from bitfleet.trainer.engine import backward, create_engine, shard
from bitfleet.trainer.engine_options import EngineConfig, deepspeed_options

NETWORKS = {"birealnet18": 64, "xnornet": 224}
"""Network -> image size."""
CONTENDERS = ("bits", "DDP", "zero1")
COMPILED = "bop2ndorder_compiled"
"""The rule of the contenders that hold fp32 weights."""


@functools.cache
def _compiled_rule() -> Callable[..., None]:
    compiled: Callable[..., None] = torch.compile(bop2ndorder_step_, fullgraph=True, dynamic=True)
    return compiled


@rule(COMPILED, "exp_avg", "exp_avg_sq")
def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    rates = {key: torch.tensor(float(group[key])) for key in ("gamma", "sigma", "threshold")}
    moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    _compiled_rule()(weight.view(-1), grad.reshape(-1), *moments, **rates)


def make_step(contender: str, network: str, images: Tensor, labels: Tensor, ranks: Ranks) -> Callable[[], None]:
    """A training step of `network` on data in memory, under one of CONTENDERS; every rank calls it."""
    torch.manual_seed(0)
    model: nn.Module = create_model(ModelConfig(name=network)).to(images.device)
    optimizer, schedules = build_optimizer(model, OptimConfig(), num_steps=1000)
    for group in optimizer.param_groups:
        if contender != "bits" and group["rule"] == "bop2ndorder":
            group["rule"] = COMPILED
    if contender == "DDP":
        wrapped = DistributedDataParallel(model) if ranks.world_size > 1 else model

        def bare_step() -> None:
            loss = nn.functional.cross_entropy(wrapped(images), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

        return bare_step
    config = EngineConfig(sharding="bits" if contender == "bits" else "zero1")
    batch = len(labels) * ranks.world_size
    options = deepspeed_options(
        config, global_batch_size=batch, num_replicas=ranks.world_size, world_size=ranks.world_size
    )
    engine = create_engine(model, shard(optimizer, config, ranks.world_size), schedules, options, images.device)

    def engine_step() -> None:
        backward(engine, nn.functional.cross_entropy(engine(images), labels), config.sharding)
        engine.step()

    return engine_step


def bench_sharding(
    network: str, ranks: Ranks, device: torch.device, *, micro_batch_size: int, num_rounds: int, num_steps: int
) -> dict[str, list[float]]:
    """Seconds a step, one value a round, of each contender, after a round that does not count."""
    size = NETWORKS[network]
    images = torch.randn(micro_batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (micro_batch_size,), device=device)
    steps = {contender: make_step(contender, network, images, labels, ranks) for contender in CONTENDERS}
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for count in range(num_rounds + 1):
        for contender, step in steps.items():
            barrier()
            start = time.perf_counter()
            for _ in range(num_steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            barrier()
            if count > 0:
                seconds[contender].append((time.perf_counter() - start) / num_steps)
    steps.clear()
    gc.collect()
    return seconds


def format_sharding(network: str, ranks: Ranks, micro_batch_size: int, seconds: dict[str, list[float]]) -> str:
    """The table of one network: ms a step and the ratio of bitfleet's step to each, medians over the rounds."""
    lines = [
        f"{network}, {NETWORKS[network]} px, {ranks.world_size} ranks x {micro_batch_size} images, median of rounds"
    ]
    names = {"bits": "bitfleet", "DDP": "DDP, compiled rule", "zero1": "DeepSpeed ZeRO-1, compiled rule"}
    for contender, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["bits"], values, strict=True))
        milliseconds = 1e3 * statistics.median(values)
        lines.append(f"  {names[contender]:<31} {milliseconds:9.1f} ms a step   bitfleet takes {ratio:.3f} of it")
    return "\n".join(lines)
