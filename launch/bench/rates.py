"""Rates of this machine for `bitfleet plan`, and what a plan with them says of a step against the step itself, in turns."""

import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.launch.plan.plan import Cluster, Estimate, estimate
from bitfleet.launch.plan.rates import FLOP_PER_MAC, Rates, numbers
from bitfleet.launch.plan.traffic import describe
from bitfleet.models import compile_network, create_model
from bitfleet.optim import build_optimizer
from bitfleet.optim.rules.rule import numbers_of
from bitfleet.optim.sharding.buckets import Bucket, make_buckets
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import TrainLoader, normalize, open_dataset
from bitfleet.trainer.engine.compilation import is_compiled
from bitfleet.trainer.ranks.collectives import (
    Ranks,
    barrier,
    from_first_rank,
    gather_from_ranks,
    objects_from_ranks,
    sum_over_ranks_,
)
from bitfleet.trainer.trainer import Trainer

WIRE_NUMEL = 1 << 20
"""Elements that each rank contributes to a measurement of bytes/s."""


class Check(NamedTuple):
    """What `bench_plan` found."""

    rates: Rates
    predicted: Estimate
    """With the medians of the rates."""
    measured: list[float]
    """Seconds of a training step, one value a round."""
    of_cores: list[float]
    """The CPU time of the step over all ranks, divided by the cores: what a CPU would take if it had nothing else to do."""
    ratios: list[float]
    """Predicted / measured, each round with its own rates."""
    of_cores_ratios: list[float]
    """Predicted / of_cores."""


class _Probe:
    """The parts of a training step, each alone; all ranks measure at the same time, as they work at the same time."""

    def __init__(self, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        self.network = describe(config)
        torch.manual_seed(0)
        self.model = create_model(config.model).to(device)
        if is_compiled(config.model.compile, device, config.engine.sharding, None):
            compile_network(self.model)
        self.micro_batch_size = max(2, config.global_batch_size // (config.num_replicas or ranks.world_size))
        size = config.data.image_size
        images = torch.zeros(self.micro_batch_size, size, size, 3, dtype=torch.uint8, device=device).random_()
        self.images = normalize(images, config.data.mean, config.data.std)
        self.labels = torch.zeros(self.micro_batch_size, dtype=torch.int64, device=device)
        self.loader = TrainLoader(
            open_dataset(config.data),
            config.data,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            num_replicas=config.num_replicas or ranks.world_size,
            device=device,
            rank=ranks.rank,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
        )
        self.batches = self.loader.batches()
        self.buckets = self._own_buckets()
        cores = len(os.sched_getaffinity(0))
        self.cores = float(cores)

    def _own_buckets(self) -> list[Bucket]:
        twin = create_model(self.config.model).to(self.device)
        groups = build_optimizer(twin, self.config.optim, num_steps=1)[0].param_groups
        return make_buckets(groups, 1 << 23, 0, 1)

    def clocks(self, work: Callable[[], object], times: int) -> tuple[float, float]:
        """(seconds, CPU seconds of this process's threads) of one `work`, while all ranks do it."""
        barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(times):
            work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / times, (time.process_time() - cpu_start) / times

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Of one `work` on a GPU, or of a core: CPU time, which does not count what other jobs took of the machine."""
        seconds, core_seconds = self.clocks(work, times)
        return seconds if self.device.type == "cuda" else core_seconds

    def passes(self, num_images: int) -> None:
        """Forward and backward of a micro-batch."""
        loss = nn.functional.cross_entropy(self.model(self.images[:num_images]), self.labels[:num_images])
        torch.autograd.backward(loss)

    def launch_seconds(self, fixed: float) -> float:
        """Of one kernel.

        Args:
            fixed: seconds of `passes` that do not depend on the number of images.
        """
        num_kernels = self.network.passes.forward.eager + self.network.passes.backward.eager
        # A GPU is done with two images before its host has launched the next kernel. On a CPU they are work.
        return (self.seconds(lambda: self.passes(2), 4) if self.device.type == "cuda" else fixed) / num_kernels

    def decode_core_seconds(self, num_batches: int) -> float:
        """CPU time of an image, over all threads of this process."""
        next(self.batches)
        start = time.process_time()
        decoded = sum(len(next(self.batches)[1]) for _ in range(num_batches))
        return (time.process_time() - start) / decoded

    def fill(self) -> None:
        """Gradients into the buckets, and signs back into the weights."""
        for bucket in self.buckets:
            for index, segment in enumerate(bucket.segments):
                segment.param.grad = torch.zeros_like(segment.param)
                bucket.add_gradient(index)
            bucket.end_replica()
            bucket.take_gradient()
            if bucket.binary:
                bucket.unpack(bucket.signs())

    def update(self, grads: list[Tensor]) -> None:
        """The rule on every weight."""
        for bucket, grad in zip(self.buckets, grads, strict=True):
            for run in bucket.advance([True] * len(bucket.segments)):
                bucket.update_(grad, run, numbers_of(bucket.group, run.step), None)

    @torch.no_grad()
    def bucket_ns(self) -> tuple[float, float]:
        """Nanoseconds for a weight of `fill` and of `update`."""
        grads = [torch.zeros(bucket.slice_numel, device=self.device) for bucket in self.buckets]
        for work in (self.fill, lambda: self.update(grads)):
            work()
        scale = 1e9 / self.network.num_parameters
        return scale * self.seconds(self.fill, 5), scale * self.seconds(lambda: self.update(grads), 5)

    def wire(self) -> tuple[float, float]:
        """Bytes/s for a GPU or core, and seconds of a round of messages; (1e9, 1e-5) on one rank."""
        number = self.ranks.world_size
        if number == 1:
            return 1e9, 1e-5
        few, many = torch.zeros(2, device=self.device), torch.zeros(WIRE_NUMEL, device=self.device)
        latency, _ = self.clocks(lambda: sum_over_ranks_(few), 20)
        each = self.seconds(lambda: gather_from_ranks(many), 4)
        return 4 * WIRE_NUMEL * (number - 1) / each, latency / math.log2(number)

    def rates(self) -> Rates:
        """One measurement of everything."""
        few = max(1, self.micro_batch_size // 4)
        whole = self.seconds(lambda: self.passes(self.micro_batch_size), 4)
        part = self.seconds(lambda: self.passes(few), 4)
        slope = max((whole - part) / (self.micro_batch_size - few), 0.1 * whole / self.micro_batch_size)
        fixed = max(whole - slope * self.micro_batch_size, 1e-6)
        decode = self.decode_core_seconds(4)
        filled, updated = self.bucket_ns()
        sent, latency = self.wire()
        values = {
            "cores": self.cores,
            "flops_per_second": FLOP_PER_MAC * self.network.macs / slope,
            "launch_seconds": self.launch_seconds(fixed),
            "graph_seconds": 10e-6,
            "node_seconds": 1e-6,
            "whole_ns": filled,
            "update_ns": updated,
            "plain_update_ns": 40 * updated,
            "decode_seconds": decode,
            "core_decode_seconds": decode,
            "copy_bytes_per_second": 25e9,
            "local_bytes_per_second": sent,
            "latency_seconds": latency,
            "link_efficiency": 0.9,
        }
        device = "a GPU" if self.device.type == "cuda" else "a core"
        here = f"measured with {self.ranks.world_size} ranks at work, for {device}"
        sources = dict.fromkeys(values, here) | {
            "flops_per_second": f"{here}: {self.config.model.name}, {self.config.data.image_size} px, "
            f"{1 / slope:,.1f} images/s",
            "plain_update_ns": "40 times update_ns (docs/sharding.md)",
            "graph_seconds": "assumed",
            "node_seconds": "assumed",
            "copy_bytes_per_second": "assumed: PCIe 4",
            "link_efficiency": "assumed",
        }
        if self.ranks.world_size == 1:
            sources |= dict.fromkeys(("local_bytes_per_second", "latency_seconds"), "assumed: one rank sends nothing")
        kind = "gpu" if self.device.type == "cuda" else "cpu"
        return Rates(name=f"this machine ({kind})", device=kind, sources=sources, **values)  # type: ignore[arg-type]


def bench_plan(
    config: TrainConfig, given: Rates | None, ranks: Ranks, device: torch.device, *, num_rounds: int, num_steps: int
) -> Check:
    """In turns, after a round that does not count: the rates, and `num_steps` training steps; every rank calls this.

    Args:
        config: the run.
        given: rates to predict with, instead of those measured in the same round.
        ranks: this process's place, on one machine.
        device: where it trains.
        num_rounds: rounds that count.
        num_steps: training steps of a round.
    """
    probe = _Probe(config, ranks, device)
    cluster = Cluster(
        num_nodes=1,
        ranks_per_node=ranks.world_size,
        link_bytes_per_second=1.0,
        cores=(given.cores if given else probe.cores),
    )
    found: list[Rates] = []
    check = Check(probe.rates(), estimate(config, probe.network, given or probe.rates(), cluster), [], [], [], [])
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(from_first_rank(folder)) / "run"
        trainer = Trainer(dataclasses.replace(config, run_dir=run_dir, resume=None), ranks, device)
        trainer.start()
        for count in range(num_rounds + 1):
            rates = probe.rates()
            seconds, core_seconds = probe.clocks(trainer.advance, num_steps)
            whole = sum(objects_from_ranks(core_seconds)) / probe.cores
            if count > 0:
                found.append(rates)
                check.measured.append(seconds)
                predicted = estimate(config, probe.network, given or rates, cluster).step
                check.of_cores.append(whole)
                check.ratios.append(predicted / seconds)
                check.of_cores_ratios.append(predicted / whole)
        trainer.stop()
        barrier()
    middle = medians(found)
    return check._replace(rates=middle, predicted=estimate(config, probe.network, given or middle, cluster))


def medians(found: list[Rates]) -> Rates:
    """Of every number; the words are those of the last."""
    values = {name: statistics.median(numbers(rates)[name] for rates in found) for name in numbers(found[0])}
    return dataclasses.replace(found[-1], **values)  # type: ignore[arg-type]


def format_check(config: TrainConfig, ranks: Ranks, check: Check) -> str:
    """The prediction beside the measurement, for a terminal."""
    e = check.predicted
    return "\n".join(
        [
            f"{config.name} on {ranks.world_size} ranks, ms a step, median of {len(check.measured)} rounds",
            f"  predicted        {1e3 * e.step:10,.1f}  (data {1e3 * e.data:,.1f}, compute {1e3 * e.compute:,.1f}, launches "
            f"{1e3 * e.launches:,.1f}, network {1e3 * e.network:,.1f}, update {1e3 * e.update:,.1f})",
            f"  measured         {1e3 * statistics.median(check.measured):10,.1f}",
            f"  ratio            {statistics.median(check.ratios):10.3f}  ({min(check.ratios):.3f} to {max(check.ratios):.3f})",
            f"  CPU time / cores {1e3 * statistics.median(check.of_cores):10,.1f}  a step on cores that do nothing else",
            f"  ratio to that    {statistics.median(check.of_cores_ratios):10.3f}  "
            f"({min(check.of_cores_ratios):.3f} to {max(check.of_cores_ratios):.3f})",
        ]
    )
