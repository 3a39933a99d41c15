"""Measure this machine's rates for `bitfleet plan`, and compare a plan with training steps."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bitfleet.launch.bench.command import Plan
from bitfleet.launch.bench.loops import started
from bitfleet.launch.bench.results import compare, titled
from bitfleet.launch.bench.timing import interleave, take_turn
from bitfleet.launch.bench.training import TrainingStep
from bitfleet.launch.job import num_cores
from bitfleet.launch.plan.plan import Cluster, estimate
from bitfleet.launch.plan.rates import FLOP_PER_MAC, Rates, numbers, write_rates
from bitfleet.launch.plan.traffic import describe
from bitfleet.models import compile_network, create_model
from bitfleet.optim import build_optimizer
from bitfleet.optim.rules.rule import numbers_of
from bitfleet.optim.sharding.buckets import make_buckets
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_tensors, all_reduce_sum_
from bitfleet.trainer.trainer import Trainer

WIRE_NUMEL = 1 << 20
"""Elements that each rank contributes to a measurement of bytes/s."""


class _Probe:
    """The parts of a training step, each alone, measured by all ranks at the same time."""

    def __init__(self, config: TrainConfig, trainer: Trainer) -> None:
        self.config, self.ranks, self.device = config, trainer.ranks, trainer.device
        self.network, self.cores = describe(config), float(num_cores())
        torch.manual_seed(0)
        signs = dataclasses.replace(config.model, initial_weights="signs")  # as after the first update
        model, twin = (create_model(signs).to(self.device) for _ in "12")
        if trainer.compiled:
            compile_network(model)
        self.micro_batch_size = max(2, config.global_batch_size // trainer.num_replicas)
        shape = (self.micro_batch_size, config.data.image_size, config.data.image_size, 3)
        images = torch.zeros(shape, dtype=torch.uint8, device=self.device).random_()
        self.images = normalize(images, config.data.mean, config.data.std)
        self.step = TrainingStep("ddp", model, self.images)
        self.batches = trainer.batches
        self.buckets = make_buckets(build_optimizer(twin, config.optim, num_steps=1)[0].param_groups, 1 << 23, 0, 1)

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Return the seconds of `work` on a GPU, or its CPU time, which other jobs hardly
        change."""
        turn = take_turn(work, times, self.device)
        return turn.seconds if self.device.type == "cuda" else turn.cpu_seconds

    def passes(self, num_images: int) -> float:
        """Return the seconds of forward and backward of a micro-batch."""
        self.step.images = self.images[:num_images]
        self.step.labels = torch.zeros(num_images, dtype=torch.int64, device=self.device)
        return self.seconds(self.step.backward, 4)

    def decode_seconds(self, num_batches: int = 4) -> float:
        """Return the CPU time per image, over all threads of this process."""
        next(self.batches)
        start = time.process_time()
        decoded = sum(len(next(self.batches)[1]) for _ in range(num_batches))
        return (time.process_time() - start) / decoded

    def fill(self) -> None:
        """Add gradients to the buckets, and write signs into the weights."""
        for bucket in self.buckets:
            for index, segment in enumerate(bucket.segments):
                segment.param.grad = torch.zeros_like(segment.param)
                bucket.add_gradient(index)
            bucket.end_replica()
            bucket.take_gradient()
            if bucket.binary:
                bucket.unpack(bucket.signs())

    def update(self, grads: list[Tensor]) -> None:
        """Run the rule on every weight."""
        for bucket, grad in zip(self.buckets, grads, strict=True):
            for run in bucket.advance([True] * len(bucket.segments)):
                bucket.update_(grad, run, numbers_of(bucket.group, run.step), None)

    @torch.no_grad()
    def bucket_ns(self) -> tuple[float, float]:
        """Return the nanoseconds per weight of `fill` and of `update`."""
        grads = [torch.zeros(bucket.slice_numel, device=self.device) for bucket in self.buckets]
        works = self.fill, lambda: self.update(grads)
        for work in works:
            work()
        fill, update = (1e9 * self.seconds(work, 5) / self.network.num_parameters for work in works)
        return fill, update

    def wire(self) -> tuple[float, float]:
        """Return bytes/s per GPU or core, and seconds per round of messages."""
        world_size = self.ranks.world_size
        if world_size == 1:
            return 1e9, 1e-5
        few, many = torch.zeros(2, device=self.device), torch.zeros(WIRE_NUMEL, device=self.device)
        latency = take_turn(lambda: all_reduce_sum_(few), 20, self.device).seconds
        gather = self.seconds(lambda: all_gather_tensors(many), 4)
        return 4 * WIRE_NUMEL * (world_size - 1) / gather, latency / math.log2(world_size)

    def rates(self) -> Rates:
        """Measure everything once."""
        few, is_gpu = max(1, self.micro_batch_size // 4), self.device.type == "cuda"
        batch, part = self.passes(self.micro_batch_size), self.passes(few)
        slope = max((batch - part) / (self.micro_batch_size - few), 0.1 * batch / self.micro_batch_size)
        # A GPU is done with two images before its host has launched the next kernel. On a CPU they
        # are work.
        launches = self.passes(2) if is_gpu else batch - slope * self.micro_batch_size
        decode = self.decode_seconds()
        filled, updated = self.bucket_ns()
        sent, latency = self.wire()
        measured = {
            "cores": self.cores,
            "flops_per_second": FLOP_PER_MAC * self.network.macs / slope,
            "launch_seconds": max(launches, 1e-6) / self.network.num_operators,
            "whole_ns": filled,
            "update_ns": updated,
            "plain_update_ns": 40 * updated,
            "decode_seconds": decode,
            "core_decode_seconds": decode,
            "local_bytes_per_second": sent,
            "latency_seconds": latency,
        }
        assumed = {"node_seconds": 1e-6, "link_efficiency": 0.9}
        here = f"measured with {self.ranks.world_size} ranks at work, for {'a GPU' if is_gpu else 'a core'}"
        size = self.config.data.image_size
        sources = dict.fromkeys(measured, here) | dict.fromkeys(assumed, "assumed")
        sources["flops_per_second"] = f"{here}: {self.config.model.name}, {size} px, {1 / slope:,.1f} images/s"
        sources["plain_update_ns"] = "40 times update_ns (docs/sharding.md)"
        if self.ranks.world_size == 1:
            sources |= dict.fromkeys(("local_bytes_per_second", "latency_seconds"), "assumed: one rank sends nothing")
        kind = "gpu" if is_gpu else "cpu"
        values = measured | assumed
        return Rates(name=f"this machine ({kind})", device=kind, sources=sources, **values)  # type: ignore[arg-type]


def bench_plan(options: Plan, config: TrainConfig, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Measure in turns the rates and training steps; every rank calls this."""
    with started(config, ranks, device) as trainer:
        probe = _Probe(config, trainer)
        nodes: Any = {"num_nodes": 1, "ranks_per_node": ranks.world_size}
        cluster = Cluster(**nodes, link_bytes_per_second=1.0, cores=probe.cores)

        def measure() -> tuple[Rates, float]:
            """Return rates and the seconds of a training step."""
            return probe.rates(), take_turn(trainer.advance, options.steps, device).seconds

        rounds = interleave({"": measure}, options.rounds)[""]
    all_rates, measured = zip(*rounds, strict=True)
    predicted = [estimate(config, probe.network, rates, cluster).step for rates in all_rates]
    milliseconds = {"predicted": [1e3 * each for each in predicted], "measured": [1e3 * each for each in measured]}
    yield titled(
        f"{config.name} on {ranks.world_size} ranks, median of {options.rounds} rounds (quartiles)",
        [compare("ms per step", milliseconds)],
    )
    if options.output and ranks.is_main:
        write_rates(medians(all_rates), options.output)
        yield f"rates written to {options.output}"


def medians(measured: Sequence[Rates]) -> Rates:
    """Return the median of every rate, with the words of the last measurement."""
    values = {name: statistics.median(numbers(rates)[name] for rates in measured) for name in numbers(measured[0])}
    return dataclasses.replace(measured[-1], **values)  # type: ignore[arg-type]
