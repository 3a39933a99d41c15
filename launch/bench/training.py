"""Training steps for benchmarks, and those of networks against timm's resnet18."""

import functools
import gc
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from bitfleet.launch.bench.command import Networks
from bitfleet.launch.bench.results import Row, titled
from bitfleet.launch.bench.timing import interleave, ratios, seconds_per_call
from bitfleet.models import ModelConfig, compile_network, create_model
from bitfleet.optim import HyperparameterScheduler, OptimConfig, ShardedOptimizer, build_optimizer, linear
from bitfleet.optim.sharding.optimizer import BUCKET_NUMEL
from bitfleet.trainer.data import normalize
from bitfleet.trainer.engine.arithmetic import use_arithmetic
from bitfleet.trainer.engine.config import EngineConfig, Precision, deepspeed_options
from bitfleet.trainer.engine.engine import autocast, backward, create_engine
from bitfleet.trainer.ranks.collectives import Ranks

REFERENCE = "resnet18"
"""timm's, which `setting_step` gives fused AdamW."""
IMAGE_SIZES = {"binarynet": 32, "birealnet_small": 32}
"""Pixels of a side; 224 for other networks."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
RATES = OptimConfig(
    gamma=linear(1e-4, 1e-9), sigma=linear(1e-5, 1e-2), threshold=linear(1e-8, 1e-5), lr=linear(2.5e-3, 5e-6)
)
Method = Literal["bits", "none", "zero1", "zero2", "ddp", "local", "adamw"]
"""Way to reduce gradients and to update: bitfleet's sharding or a ZeRO stage in DeepSpeed's engine;
DistributedDataParallel; without an engine, on one rank, the sharded optimizer or fused AdamW."""
GradDtype = Literal["fp32", "bf16"]


def use_precision(precision: Precision, device: torch.device, *, deterministic: bool = True) -> torch.autocast:
    """Set torch up as a run does, and return the context of forward passes; tf32 on a CPU is fp32.

    The settings hold for the process until they are changed.
    """
    if precision == "tf32" and device.type == "cpu":
        precision = "fp32"
    use_arithmetic(device, EngineConfig(precision=precision, deterministic=deterministic))
    return autocast(device, precision)


class TrainingStep:
    """A training step on fixed images, all with label 0.

    Args:
        method: way to reduce gradients and to update.
        model: network to train, on the device of the images.
        images: uint8 [N, H, W, 3], which every step normalizes, or inputs of the network.
        world_size: number of ranks.
        optim: optimizer of all methods but "adamw".
        context: autocast of forward passes outside of DeepSpeed's engine; None: fp32.
        grad_dtype: what gradients are sent as.
        bucket_numel: parameters per bucket; None: the method's default.
        rule: update rule in place of Bop2ndOrder where the weights are fp32.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        images: Tensor,
        world_size: int = 1,
        *,
        optim: OptimConfig = RATES,
        context: torch.autocast | None = None,
        grad_dtype: GradDtype = "fp32",
        bucket_numel: int | None = None,
        rule: str | None = None,
    ) -> None:
        self.model, self.images = model.to(images.device), images
        self.labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.context = context or autocast(images.device, "fp32")
        self.has_engine = method in ("bits", "none", "zero1", "zero2")
        self.engine: Any = self.model
        self.optimizer: torch.optim.Optimizer
        self.scheduler: HyperparameterScheduler | None = None
        if method == "adamw":
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            return
        plain, schedules = build_optimizer(model, optim, num_steps=1000)
        self.optimizer = plain
        if method in ("bits", "local"):
            dtype = torch.bfloat16 if grad_dtype == "bf16" else torch.float32
            self.optimizer = ShardedOptimizer(plain, grad_dtype=dtype, bucket_numel=bucket_numel or BUCKET_NUMEL)
        elif rule:
            for group in plain.param_groups:
                group["rule"] = rule if group["rule"] == "bop2ndorder" else group["rule"]
        if self.has_engine:
            sizes = {"global_batch_size": len(images) * world_size, "num_replicas": world_size}
            config = EngineConfig(sharding=method, precision="fp32")  # type: ignore[arg-type]
            options = deepspeed_options(config, world_size=world_size, **sizes)
            if method != "bits":
                options["communication_data_type"] = grad_dtype
                sizes = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), bucket_numel or 0)
                options["zero_optimization"] |= sizes if bucket_numel else {}
            self.engine = create_engine(model, self.optimizer, schedules, options, images.device)
            return
        self.scheduler = HyperparameterScheduler(self.optimizer, schedules)
        if method == "ddp" and world_size > 1:
            megabytes = 4 * bucket_numel / 2**20 if bucket_numel else None
            self.engine = DistributedDataParallel(model, bucket_cap_mb=megabytes)
            if grad_dtype == "bf16":
                self.engine.register_comm_hook(None, bf16_compress_hook)

    def backward(self) -> Tensor:
        """Run forward and backward; returns the loss, a tensor []."""
        images = normalize(self.images, MEAN, STD) if self.images.dtype == torch.uint8 else self.images
        with self.context:
            logits = self.engine(images)
        loss = nn.functional.cross_entropy(logits.float(), self.labels)
        if self.has_engine:
            backward(self.engine, loss, self.optimizer)
        else:
            torch.autograd.backward(loss)
        return loss.detach()

    def update(self) -> None:
        """Finish the reduction and update the weights; no gradient is left."""
        if self.has_engine:
            self.engine.step()
            return
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

    def __call__(self) -> Tensor:
        """Run the step; returns the loss, a tensor []."""
        loss = self.backward()
        self.update()
        return loss

    def close(self) -> None:
        """Free the engine, its hooks and the network."""
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.close()
        if self.has_engine:
            self.engine.destroy()
        del self.engine, self.optimizer, self.model
        gc.collect()


class Setting(NamedTuple):
    """A network and how it is trained."""

    network: str
    """Name in timm's registry."""
    batch_size: int
    precision: Precision
    is_compiled: bool = False
    deterministic: bool = True
    """engine.deterministic, for the reference too."""


def setting_step(setting: Setting, image_size: int, device: torch.device, method: Method = "local") -> TrainingStep:
    """Return a step of one process on random uint8 images; the reference has fused AdamW."""
    torch.manual_seed(0)
    context = use_precision(setting.precision, device, deterministic=setting.deterministic)
    model = create_model(ModelConfig(name=setting.network, num_classes=1000)).to(device)
    if setting.network == REFERENCE:
        method, model = "adamw", model.to(memory_format=torch.channels_last)
    if setting.is_compiled:
        compile_network(model)
    shape = (setting.batch_size, image_size, image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return TrainingStep(method, model, images, context=context)


def bench_networks(options: Networks, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Yield a table per precision.

    Raises:
        ValueError: there are several ranks.
    """
    if ranks.world_size > 1:
        raise ValueError(f"bench networks measures one process, but there are {ranks.world_size} ranks: start one")
    default = 50 if options.network == "binarynet" else 128 if device.type == "cuda" else 8
    batch_size, image_size = options.batch_size or default, IMAGE_SIZES.get(options.network, 224)
    kinds, names = (False, True) if options.compiled else (False,), (REFERENCE, options.network)
    precisions: tuple[Precision, ...] = (options.precision,) if options.precision else ("fp32", "bf16")
    for precision in precisions:
        settings = [Setting(name, batch_size, precision, is_compiled) for is_compiled in kinds for name in names]
        yield titled(
            f"training steps of {batch_size} images, {device.type} ({torch.get_num_threads()} threads), median of "
            f"{options.rounds} rounds",
            measure_settings(settings, image_size, device, num_rounds=options.rounds, num_steps=options.steps),
        )


def measure_settings(
    settings: Sequence[Setting], image_size: int, device: torch.device, *, num_rounds: int, num_steps: int
) -> list[Row]:
    """Time the settings in turns, each network after the reference that it is compared with.

    All networks are in memory at the same time; peak_MB is what each takes on a GPU.
    """
    steps, peaks = [], []
    for setting in settings:
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        steps.append(setting_step(setting, image_size, device))
        steps[-1]()  # compiles
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            steps[-1]()
        peaks.append((torch.cuda.max_memory_allocated(device) - before) / 1e6 if device.type == "cuda" else None)
    turns = {f"{i}": functools.partial(seconds_per_call, step, num_steps, device) for i, step in enumerate(steps)}
    seconds = list(interleave(turns, num_rounds).values())
    rows: list[Row] = []
    reference = seconds[0]
    for i, setting in enumerate(settings):
        reference = seconds[i] if setting.network == REFERENCE else reference
        quotients = ratios(reference, seconds[i])
        rate, middle = setting.batch_size / statistics.median(seconds[i]), statistics.median(quotients)
        figures = {"images_per_second": rate, "of_resnet18": middle, "least": min(quotients), "most": max(quotients)}
        rows.append({"what": setting.network, **setting._asdict(), **figures, "peak_MB": peaks[i]})
    for step in steps:
        step.close()
    return rows
