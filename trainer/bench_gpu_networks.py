"""Part "networks" of `bitfleet bench gpu`: images/s and peak memory of a training step, against timm's resnet18.

The steps are those of `bitfleet bench networks`; here they come one after the other, in order of worth, in every precision.
"""

import statistics
from typing import NamedTuple

import torch

from bitfleet.trainer.bench_gpu_session import Session
from bitfleet.trainer.bench_networks import REFERENCE, Contender, Kind
from bitfleet.trainer.bench_precision import use_precision
from bitfleet.trainer.engine_options import Precision

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


def measure_networks(session: Session) -> None:
    """Write down every setting for which there is time, in order of worth."""
    for setting in TINY if session.tiny else SETTINGS:
        needed = _COMPILE_SECONDS if setting.is_compiled else _EAGER_SECONDS
        session.attempt(setting.network, _measure, session, setting, needs_seconds=0.0 if session.tiny else needed)


def contender(setting: Setting, image_size: int, device: torch.device) -> Contender:
    """The network, its optimizer and random images, after one step."""
    if setting.is_compiled:  # the limit of recompilations counts over all networks of a process
        torch.compiler.reset()
    use_precision(setting.precision, device, deterministic=setting.deterministic)
    kind = Kind(setting.precision, setting.is_compiled)
    return Contender(setting.network, kind, setting.batch_size, image_size, device)


def _measure(session: Session, setting: Setting) -> None:
    size, steps, rounds = (32, 1, 1) if session.tiny else (224, 4, 5)
    measured = contender(setting, size, session.device)
    measured.seconds(steps)
    seconds = [measured.seconds(steps) for _ in range(rounds)]
    peak = measured.peak_bytes()
    measured.close()
    middle = statistics.median(seconds)
    facts = setting._asdict()
    session.add(
        facts.pop("network"),
        **facts,
        images_per_second=setting.batch_size / middle,
        ms=middle * 1e3,
        ms_least=min(seconds) * 1e3,
        ms_most=max(seconds) * 1e3,
        peak_MB=peak / 1e6,
        first_step_seconds=measured.first_seconds,
    )
