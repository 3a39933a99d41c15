"""The precisions of a run, for benchmarks that make a training step without the trainer."""

import torch

from bitfleet.trainer.engine.arithmetic import use_arithmetic
from bitfleet.trainer.engine.config import EngineConfig, Precision
from bitfleet.trainer.engine.engine import autocast

PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")


def use_precision(name: Precision, device: torch.device, *, deterministic: bool = True) -> torch.autocast:
    """Set torch up as a run with that engine.precision and engine.deterministic does, and return what forward passes enter.

    The settings are those of the whole process and stay. A CPU has no TF32: there "tf32" is fp32.
    """
    precision = "fp32" if name == "tf32" and device.type == "cpu" else name
    use_arithmetic(device, EngineConfig(precision=precision, deterministic=deterministic))
    return autocast(device, precision)
