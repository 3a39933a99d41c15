"""Training steps for benchmarks: a network, its optimizer, random images and labels."""

import gc
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from bitfleet.models import ModelConfig, compile_network, create_model
from bitfleet.optim import HyperparameterScheduler, OptimConfig, ShardedOptimizer, build_optimizer, linear
from bitfleet.optim.sharding.optimizer import BUCKET_NUMEL
from bitfleet.trainer.data import normalize
from bitfleet.trainer.engine.arithmetic import use_arithmetic
from bitfleet.trainer.engine.config import EngineConfig, Precision, deepspeed_options
from bitfleet.trainer.engine.engine import autocast, backward, create_engine
from bitfleet.trainer.ranks.collectives import Ranks

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
REFERENCE = "resnet18"
"""timm's, which `TrainingStep` gives fused AdamW."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
RATES = OptimConfig(
    gamma=linear(1e-4, 1e-9), sigma=linear(1e-5, 1e-2), threshold=linear(1e-8, 1e-5), lr=linear(2.5e-3, 5e-6)
)
Method = Literal["bits", "none", "zero1", "zero2", "ddp"]
GradDtype = Literal["fp32", "bf16"]


class Setting(NamedTuple):
    """Options of a `TrainingStep`."""

    network: str
    """Name in timm's registry."""
    batch_size: int
    precision: Precision
    is_compiled: bool = False
    deterministic: bool = True
    """engine.deterministic, for the reference too."""


def use_precision(precision: Precision, device: torch.device, *, deterministic: bool = True) -> torch.autocast:
    """Set torch up as a run does, and return the context of forward passes; tf32 on a CPU is fp32.

    The settings hold for the process until they are changed.
    """
    if precision == "tf32" and device.type == "cpu":
        precision = "fp32"
    use_arithmetic(device, EngineConfig(precision=precision, deterministic=deterministic))
    return autocast(device, precision)


class TrainingStep:
    """A training step of one process without DeepSpeed, on random uint8 images.

    bitfleet's networks have the sharded flip optimizer on one rank and its schedules, resnet18 has
    fused AdamW.
    """

    def __init__(self, setting: Setting, image_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.autocast = use_precision(setting.precision, device, deterministic=setting.deterministic)
        model = create_model(ModelConfig(name=setting.network, num_classes=1000)).to(device)
        self.optimizer: torch.optim.Optimizer
        if setting.network == REFERENCE:
            model = model.to(memory_format=torch.channels_last)
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            self._after: Callable[[], object] = self.optimizer.zero_grad
        else:
            plain, schedules = build_optimizer(model, RATES, num_steps=1000)
            self.optimizer = ShardedOptimizer(plain)
            self._after = HyperparameterScheduler(self.optimizer, schedules).step
        if setting.is_compiled:
            compile_network(model)
        self.model = model
        shape = (setting.batch_size, image_size, image_size, 3)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, 1000, (setting.batch_size,), device=device)

    def backward(self) -> Tensor:
        """Run forward and backward; returns the loss, a tensor []."""
        with self.autocast:
            logits = self.model(normalize(self.images, MEAN, STD))
        loss = nn.functional.cross_entropy(logits.float(), self.labels)
        torch.autograd.backward(loss)
        return loss.detach()

    def __call__(self) -> Tensor:
        """Run the step; returns the loss, a tensor []."""
        loss = self.backward()
        self.optimizer.step()
        self._after()
        return loss

    def close(self) -> None:
        """Remove the optimizer's hooks from the parameters."""
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.close()


class RankStep:
    """A training step of several ranks, under one way to reduce gradients.

    Args:
        method: sharding of bitfleet ("bits") or DeepSpeed, or DistributedDataParallel.
        model: network to train on the device of the images.
        images: inputs of the model on this rank.
        ranks: rank and number of ranks.
        grad_dtype: what gradients are sent as.
        bucket_numel: parameters per bucket; None: the method's default.
        rule: update rule in place of Bop2ndOrder for all methods but "bits", which hold fp32
            weights.
        precision: engine.precision.
        options: further DeepSpeed options.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        images: Tensor,
        ranks: Ranks,
        *,
        grad_dtype: GradDtype = "fp32",
        bucket_numel: int | None = None,
        rule: str | None = None,
        precision: Precision = "fp32",
        **options: Any,
    ) -> None:
        self.method, self.model, self.images = method, model.to(images.device), images
        self.labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.optimizer: torch.optim.Optimizer
        self.optimizer, schedules = plain, _ = build_optimizer(model, OptimConfig(), num_steps=1000)
        for group in plain.param_groups:
            if rule and method != "bits" and group["rule"] == "bop2ndorder":
                group["rule"] = rule
        if method == "ddp":
            self.engine: Any = model
            if ranks.world_size > 1:
                self.engine = DistributedDataParallel(
                    model, bucket_cap_mb=4 * bucket_numel / 2**20 if bucket_numel else None
                )
                if grad_dtype == "bf16":
                    self.engine.register_comm_hook(None, bf16_compress_hook)
            return
        world_size = ranks.world_size
        config = EngineConfig(sharding=method, precision=precision)
        sizes = {"global_batch_size": len(images) * world_size, "num_replicas": world_size, "world_size": world_size}
        options = deepspeed_options(config, **sizes) | options
        if method == "bits":
            dtype = torch.bfloat16 if grad_dtype == "bf16" else torch.float32
            self.optimizer = ShardedOptimizer(plain, grad_dtype=dtype, bucket_numel=bucket_numel or BUCKET_NUMEL)
        else:
            options["communication_data_type"] = grad_dtype
            if bucket_numel:
                options["zero_optimization"] |= dict.fromkeys(
                    ("reduce_bucket_size", "allgather_bucket_size"), bucket_numel
                )
        self.engine = create_engine(model, self.optimizer, schedules, options, images.device)

    def backward(self) -> None:
        """Run forward and backward of the micro-batch."""
        loss = nn.functional.cross_entropy(self.engine(self.images).float(), self.labels)
        if self.method == "ddp":
            torch.autograd.backward(loss)
        else:
            backward(self.engine, loss, self.optimizer)

    def update(self) -> None:
        """Finish the reduction and update the weights; no gradient is left."""
        if self.method == "ddp":
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            self.engine.step()

    def __call__(self) -> None:
        """Run the step."""
        self.backward()
        self.update()

    def close(self) -> None:
        """Free the engine, its hooks and the network."""
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.close()
        if self.method != "ddp":
            self.engine.destroy()
        del self.engine, self.optimizer, self.model
        gc.collect()
