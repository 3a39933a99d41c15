"""Measure this machine's rates for `bitfleet plan`, and compare a plan with training steps."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from bitfleet.launch.bench.command import Plan
from bitfleet.launch.bench.loops import started
from bitfleet.launch.bench.timing import interleave, ratios, spread, take_turn, titled
from bitfleet.launch.job import num_cores
from bitfleet.launch.plan.plan import Cluster, Estimate, estimate
from bitfleet.launch.plan.rates import FLOP_PER_MAC, Rates, numbers, read_rates, write_rates
from bitfleet.launch.plan.traffic import describe
from bitfleet.models import compile_network, create_model
from bitfleet.optim import build_optimizer
from bitfleet.optim.rules.rule import numbers_of
from bitfleet.optim.sharding.buckets import make_buckets
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import normalize
from bitfleet.trainer.ranks.collectives import Ranks, all_gather_objects, all_gather_tensors, all_reduce_sum_
from bitfleet.trainer.trainer import Trainer

WIRE_NUMEL = 1 << 20
"""Elements that each rank contributes to a measurement of bytes/s."""


class _Probe:
    """The parts of a training step, each alone, measured by all ranks at the same time."""

    def __init__(self, config: TrainConfig, trainer: Trainer) -> None:
        self.config, self.ranks, self.device = config, trainer.ranks, trainer.device
        self.network = describe(config)
        torch.manual_seed(0)
        self.model, twin = (create_model(config.model).to(self.device) for _ in "12")
        if trainer.compiled:
            compile_network(self.model)
        self.micro_batch_size = max(2, config.global_batch_size // trainer.num_replicas)
        shape = (self.micro_batch_size, config.data.image_size, config.data.image_size, 3)
        images = torch.zeros(shape, dtype=torch.uint8, device=self.device).random_()
        self.images = normalize(images, config.data.mean, config.data.std)
        self.labels = torch.zeros(self.micro_batch_size, dtype=torch.int64, device=self.device)
        self.batches = trainer.batches
        self.buckets = make_buckets(build_optimizer(twin, config.optim, num_steps=1)[0].param_groups, 1 << 23, 0, 1)
        self.cores = float(num_cores())

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Return the seconds of `work` on a GPU, or its CPU time, which other jobs hardly
        change."""
        turn = take_turn(work, times, self.device)
        return turn.seconds if self.device.type == "cuda" else turn.cpu_seconds

    def passes(self, num_images: int) -> None:
        """Run forward and backward of a micro-batch."""
        loss = nn.functional.cross_entropy(self.model(self.images[:num_images]), self.labels[:num_images])
        torch.autograd.backward(loss)

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
        batch = self.seconds(lambda: self.passes(self.micro_batch_size), 4)
        part = self.seconds(lambda: self.passes(few), 4)
        slope = max((batch - part) / (self.micro_batch_size - few), 0.1 * batch / self.micro_batch_size)
        # A GPU is done with two images before its host has launched the next kernel. On a CPU they
        # are work.
        launches = self.seconds(lambda: self.passes(2), 4) if is_gpu else batch - slope * self.micro_batch_size
        decode = self.decode_seconds()
        filled, updated = self.bucket_ns()
        sent, latency = self.wire()
        values = {
            "cores": self.cores,
            "flops_per_second": FLOP_PER_MAC * self.network.macs / slope,
            "launch_seconds": max(launches, 1e-6) / self.network.num_operators,
            "node_seconds": 1e-6,
            "whole_ns": filled,
            "update_ns": updated,
            "plain_update_ns": 40 * updated,
            "decode_seconds": decode,
            "core_decode_seconds": decode,
            "local_bytes_per_second": sent,
            "latency_seconds": latency,
            "link_efficiency": 0.9,
        }
        here = f"measured with {self.ranks.world_size} ranks at work, for {'a GPU' if is_gpu else 'a core'}"
        size = self.config.data.image_size
        sources = dict.fromkeys(values, here) | {
            "flops_per_second": f"{here}: {self.config.model.name}, {size} px, {1 / slope:,.1f} images/s",
            "plain_update_ns": "40 times update_ns (docs/sharding.md)",
            "node_seconds": "assumed",
            "link_efficiency": "assumed",
        }
        if self.ranks.world_size == 1:
            sources |= dict.fromkeys(("local_bytes_per_second", "latency_seconds"), "assumed: one rank sends nothing")
        kind = "gpu" if is_gpu else "cpu"
        return Rates(name=f"this machine ({kind})", device=kind, sources=sources, **values)  # type: ignore[arg-type]


def bench_plan(options: Plan, config: TrainConfig, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Measure in turns the rates and training steps; every rank calls this.

    Raises:
        ValueError: --rates is not a file of rates.
    """
    given = read_rates(options.rates) if options.rates else None
    with started(config, ranks, device) as trainer:
        probe = _Probe(config, trainer)
        cores = given.cores if given else probe.cores
        cluster = Cluster(num_nodes=1, ranks_per_node=ranks.world_size, link_bytes_per_second=1.0, cores=cores)

        def predict(rates: Rates) -> Estimate:
            return estimate(config, probe.network, given or rates, cluster)

        def measure() -> tuple[Rates, float, float, float]:
            """Return rates and seconds per step: predicted, measured, and CPU time of all ranks
            over the cores."""
            rates = probe.rates()
            turn = take_turn(trainer.advance, options.steps, device)
            cpu_over_cores = sum(all_gather_objects(turn.cpu_seconds)) / probe.cores
            return rates, predict(rates).step, turn.seconds, cpu_over_cores

        rounds = interleave({"": measure}, options.rounds)[""]
    all_rates, predicted, measured, cpu_over_cores = zip(*rounds, strict=True)
    rates = medians(all_rates)
    parts = predict(rates)
    shares = ("data", "compute", "launches", "network", "update")
    rows = [
        ["predicted", f"{1e3 * parts.step:,.1f}", ", ".join(f"{x} {1e3 * getattr(parts, x):,.1f}" for x in shares)],
        ["measured", f"{1e3 * statistics.median(measured):,.1f}"],
        ["ratio", spread(ratios(predicted, measured), ".3f")],
        ["CPU time / cores", f"{1e3 * statistics.median(cpu_over_cores):,.1f}"],
        ["ratio to that", spread(ratios(predicted, cpu_over_cores), ".3f")],
    ]
    yield titled(
        f"{config.name} on {ranks.world_size} ranks, ms per step, median of {options.rounds} rounds", rows, "<<<"
    )
    if options.output and ranks.is_main:
        write_rates(rates, options.output)
        yield f"rates written to {options.output}"


def medians(measured: Sequence[Rates]) -> Rates:
    """Return the median of every rate, with the words of the last measurement."""
    values = {name: statistics.median(numbers(rates)[name] for rates in measured) for name in numbers(measured[0])}
    return dataclasses.replace(measured[-1], **values)  # type: ignore[arg-type]
