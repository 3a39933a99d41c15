"""Step time of the sharded optimizer against DistributedDataParallel and DeepSpeed's ZeRO-1, interleaved in one job.

The other two get the plain rule through torch.compile: in eager torch it would take most of their step.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitfleet.launch.bench.comm import read_interfaces
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, bop2ndorder_step_, build_optimizer
from bitfleet.optim.rules.rule import Group, Rule, State, register
from bitfleet.trainer.engine.config import EngineConfig, deepspeed_options
from bitfleet.trainer.engine.engine import backward, create_engine, shard
from bitfleet.trainer.ranks.collectives import Ranks, barrier, objects_from_ranks

NETWORKS = {"birealnet18": 64, "xnornet": 224}
"""Network -> image size."""
CONTENDERS = ("bits", "DDP", "zero1")
COMPILED = "bop2ndorder_compiled"
"""The rule of the contenders that hold fp32 weights."""


@functools.cache
def _compiled_rule() -> Callable[..., None]:
    compiled: Callable[..., None] = torch.compile(bop2ndorder_step_, fullgraph=True, dynamic=True)
    return compiled


def _update_(weight: Tensor, grad: Tensor, state: State, group: Group) -> None:
    rates = {key: torch.tensor(float(group[key])) for key in ("gamma", "sigma", "threshold")}
    moments = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    _compiled_rule()(weight.view(-1), grad.reshape(-1), *moments, **rates)


register(Rule(name=COMPILED, update_=_update_, state_keys=("exp_avg", "exp_avg_sq")))


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
    sharded = shard(optimizer, config, ranks.world_size)
    engine = create_engine(model, sharded, schedules, options, images.device)

    def engine_step() -> None:
        backward(engine, nn.functional.cross_entropy(engine(images), labels), sharded)
        engine.step()

    return engine_step


class Round(NamedTuple):
    """One contender in one round, for a step."""

    seconds: float
    sent_bytes: float
    """What the interfaces of all machines sent, divided by the ranks; in a network namespace of its own, only this job's."""


def bench_sharding(
    network: str,
    ranks: Ranks,
    device: torch.device,
    *,
    micro_batch_size: int,
    num_rounds: int,
    num_steps: int,
    contenders: Sequence[str] = CONTENDERS,
) -> dict[str, list[Round]]:
    """Measure each of `contenders` in turn, `num_rounds` times after a round that does not count; every rank calls this."""
    size = NETWORKS[network]
    images = torch.randn(micro_batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (micro_batch_size,), device=device)
    steps = {contender: make_step(contender, network, images, labels, ranks) for contender in contenders}
    rounds: dict[str, list[Round]] = {contender: [] for contender in contenders}
    for count in range(num_rounds + 1):
        for contender, step in steps.items():
            before, _ = read_interfaces(ranks)
            start = time.perf_counter()
            for _ in range(num_steps):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            barrier()
            seconds = time.perf_counter() - start
            sent = read_interfaces(ranks)[0] - before
            if count > 0:
                whole = sum(objects_from_ranks(sent)) / ranks.world_size
                rounds[contender].append(Round(seconds / num_steps, whole / num_steps))
    steps.clear()
    gc.collect()
    return rounds


def format_sharding(network: str, ranks: Ranks, micro_batch_size: int, rounds: dict[str, list[Round]]) -> str:
    """The table of one network, medians over the rounds: ms, MB that a rank sent, and the ratios of bitfleet to each."""
    num_hosts = ranks.world_size // ranks.local_world_size
    lines = [
        f"{network}, {NETWORKS[network]} px, {ranks.world_size} ranks x {micro_batch_size} images on {num_hosts} "
        f"host{'s' * (num_hosts > 1)}, a step, median of {len(next(iter(rounds.values())))} rounds",
        f"  {'':<31}{'ms':>10}{'MB sent':>10}   bitfleet / it: time, bytes",
    ]
    names = {"bits": "bitfleet", "DDP": "DDP, compiled rule", "zero1": "DeepSpeed ZeRO-1, compiled rule"}
    for contender, values in rounds.items():
        line = (
            f"  {names[contender]:<31}{1e3 * statistics.median(v.seconds for v in values):10,.1f}"
            f"{1e-6 * statistics.median(v.sent_bytes for v in values):10,.1f}"
        )
        if "bits" in rounds:
            pairs = list(zip(rounds["bits"], values, strict=True))
            time_ratio = statistics.median(a.seconds / b.seconds for a, b in pairs)
            line += (
                f"{time_ratio:21.3f}{statistics.median(a.sent_bytes / max(b.sent_bytes, 1.0) for a, b in pairs):8.3f}"
            )
        lines.append(line)
    return "\n".join(lines)
