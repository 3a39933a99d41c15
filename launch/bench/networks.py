"""Time training steps of a network against timm's resnet18 on the same images, in turns."""

import functools
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bitfleet.launch.bench.command import Networks
from bitfleet.launch.bench.timing import interleave, ratios, seconds_per_call, titled
from bitfleet.launch.bench.training import REFERENCE, Setting, TrainingStep
from bitfleet.trainer.engine.config import Precision
from bitfleet.trainer.ranks.collectives import Ranks

IMAGE_SIZES = {"binarynet": 32, "birealnet_small": 32}
"""Pixels of a side; 224 for other networks."""


class Speed(NamedTuple):
    """A network in one setting."""

    setting: Setting
    first_seconds: float
    """Time of the first step, which compiles."""
    rates: list[float]
    """Images/s, one value per round."""
    peak_MB: float | None
    """Memory of a GPU that the network holds between steps, and what a step adds."""
    loss: float
    """Loss of the first step."""


def measure_settings(
    settings: Sequence[Setting], image_size: int, device: torch.device, *, num_rounds: int, num_steps: int, warm_up: int
) -> list[Speed]:
    """Time the settings in turns; all their networks are in memory at the same time."""
    steps, allocated, first_seconds, losses = [], [_allocated(device)], [], []
    for setting in settings:
        steps.append(TrainingStep(setting, image_size, device))
        first_seconds.append(seconds_per_call(lambda: losses.append(float(steps[-1]())), 1, device))
        allocated.append(_allocated(device))
    turns = {f"{i}": functools.partial(seconds_per_call, step, num_steps, device) for i, step in enumerate(steps)}
    seconds = list(interleave(turns, num_rounds, warm_up).values())
    speeds = []
    for i, (setting, step) in enumerate(zip(settings, steps, strict=True)):
        peak = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = allocated[i + 1] - allocated[i] - _allocated(device)
            seconds_per_call(step, 1, device)
            peak = (held + torch.cuda.max_memory_allocated(device)) / 1e6
        rates = [setting.batch_size / each for each in seconds[i]]
        speeds.append(Speed(setting, first_seconds[i], rates, peak, losses[i]))
    for step in steps:
        step.close()
    return speeds


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def bench_networks(options: Networks, ranks: Ranks, device: torch.device) -> Iterator[str]:
    """Yield a table per precision.

    Raises:
        ValueError: there are several ranks.
    """
    if ranks.world_size > 1:
        raise ValueError(f"bench networks measures one process, but there are {ranks.world_size} ranks: start one")
    batch_size = 50 if options.network == "binarynet" else 128 if device.type == "cuda" else 8
    batch_size = options.batch_size or batch_size
    precisions: tuple[Precision, ...] = (options.precision,) if options.precision else ("fp32", "bf16")
    kinds, names = (False, True) if options.compiled else (False,), (REFERENCE, options.network)
    for precision in precisions:
        yield f"{' and '.join(names)}, {precision}: first steps ..."
        settings = [Setting(name, batch_size, precision, is_compiled) for is_compiled in kinds for name in names]
        counts = {"num_rounds": options.rounds, "num_steps": options.steps, "warm_up": 1}
        speeds = measure_settings(settings, IMAGE_SIZES.get(options.network, 224), device, **counts)
        yield titled(
            f"training steps of {batch_size} images, {precision}, {device.type} ({torch.get_num_threads()} threads), "
            f"median of {options.rounds} rounds",
            network_rows(speeds),
            "<<",
        )


def network_rows(speeds: Sequence[Speed]) -> list[list[str]]:
    """Return the cells of a table; resnet18 in the same setting comes right before each network."""
    rows = [["", "", "images/s", f"of {REFERENCE}", "least to most", "first step s", "peak MB"]]
    for index, speed in enumerate(speeds):
        quotients = ratios(speed.rates, speeds[index - index % 2].rates)
        rows.append(
            [
                speed.setting.network,
                "compiled" if speed.setting.is_compiled else "eager",
                f"{statistics.median(speed.rates):,.1f}",
                f"{statistics.median(quotients):.3f}",
                f"{min(quotients):.3f} to {max(quotients):.3f}",
                f"{speed.first_seconds:.1f}",
                "" if speed.peak_MB is None else f"{speed.peak_MB:,.0f}",
            ]
        )
    return rows
