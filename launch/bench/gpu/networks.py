"""Part "networks" of `bitfleet bench gpu`: images/s and peak memory of a training step, against timm's resnet18.

Images are uint8 on the device and normalised there, as in the trainer; there is no loader and no DeepSpeed engine. bitfleet's
networks have the sharded flip optimizer on one rank and its schedules, resnet18 has fused AdamW.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.launch.bench.clock import seconds_per_call
from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.precision import use_precision
from bitfleet.models import ModelConfig, compile_network, create_model
from bitfleet.optim import HyperparameterScheduler, OptimConfig, ShardedOptimizer, build_optimizer, linear
from bitfleet.trainer.data import normalize
from bitfleet.trainer.engine.config import Precision

REFERENCE = "resnet18"
"""timm's, with fused AdamW."""
RATES = OptimConfig(
    gamma=linear(1e-4, 1e-9), sigma=linear(1e-5, 1e-2), threshold=linear(1e-8, 1e-5), lr=linear(2.5e-3, 5e-6)
)
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_COMPILE_SECONDS, _EAGER_SECONDS = 60.0, 15.0
"""What a setting needs, to be tried."""


class Setting(NamedTuple):
    """One training step to measure."""

    network: str
    """In timm's registry."""
    batch_size: int
    precision: Precision
    is_compiled: bool = False
    deterministic: bool = True
    """engine.deterministic, for the reference too."""


NETWORKS = ("birealnet18", "xnornet", REFERENCE)
SETTINGS = [
    *(Setting(name, 256, "bf16") for name in NETWORKS),
    *(Setting(name, 256, "bf16", is_compiled=True, deterministic=False) for name in NETWORKS),
    *(Setting(name, 256, "tf32") for name in NETWORKS),
    *(Setting(name, 256, "bf16", deterministic=False) for name in NETWORKS),
    *(Setting(name, 256, "bf16", is_compiled=True) for name in NETWORKS),
    *(Setting(name, 128, "bf16") for name in NETWORKS),
    *(Setting(name, 256, "fp32") for name in NETWORKS),
    *(Setting(name, 256, "tf32", is_compiled=True) for name in NETWORKS),
    *(Setting(name, 128, "bf16", is_compiled=True) for name in NETWORKS),
]
"""In order of worth: the targets are ratios of the second three, in which both sides are as fast as they can be."""
TINY = [Setting("birealnet_small", 2, "bf16", is_compiled=True), Setting(REFERENCE, 2, "fp32")]


class TrainingStep:
    """A network, its optimizer, and images and labels in memory; each call is one training step.

    Args:
        setting: what is measured.
        image_size: pixels.
        device: where.
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
        """Forward and backward; returns the loss, a tensor []."""
        with self.autocast:
            logits = self.model(normalize(self.images, _MEAN, _STD))
        loss = nn.functional.cross_entropy(logits.float(), self.labels)
        torch.autograd.backward(loss)
        return loss.detach()

    def __call__(self) -> Tensor:
        """The whole step; returns the loss, a tensor []."""
        loss = self.backward()
        self.optimizer.step()
        self._after()
        return loss

    def close(self) -> None:
        """Let go of the hooks on the parameters."""
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.close()


def measure_networks(session: Session) -> None:
    """Write down every setting for which there is time, in order of worth."""
    for setting in TINY if session.tiny else SETTINGS:
        needed = _COMPILE_SECONDS if setting.is_compiled else _EAGER_SECONDS
        session.attempt(setting.network, _measure, session, setting, needs_seconds=0.0 if session.tiny else needed)


def _measure(session: Session, setting: Setting) -> None:
    size, warm_up, rounds = (32, 1, 1) if session.tiny else (224, 3, 8)
    if setting.is_compiled:  # the limit of recompilations counts over all networks of a process
        torch.compiler.reset()
    if session.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step = TrainingStep(setting, size, session.device)
    loss = float(step())
    first = time.perf_counter() - start
    seconds_per_call(step, warm_up, session.device)
    seconds = [seconds_per_call(step, 1, session.device) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() / 1e6 if session.is_cuda else None
    step.close()
    middle = statistics.median(seconds)
    session.add(
        setting.network,
        **dict(zip(Setting._fields[1:], setting[1:], strict=True)),
        images_per_second=setting.batch_size / middle,
        ms=middle * 1e3,
        ms_least=min(seconds) * 1e3,
        ms_most=max(seconds) * 1e3,
        peak_MB=peak,
        first_step_seconds=first,
        loss=loss,
    )
