"""Time training steps of networks against timm's resnet18, and compare their gradients with the
CPU's."""

import functools
import statistics
from collections.abc import Iterator, Sequence

import torch

from bitfleet.launch.bench.command import Networks
from bitfleet.launch.bench.results import Row, titled
from bitfleet.launch.bench.timing import interleave, ratios, seconds_per_call
from bitfleet.launch.bench.training import REFERENCE, Setting, TrainingStep, setting_step
from bitfleet.trainer.engine.config import Precision
from bitfleet.trainer.ranks.collectives import Ranks

IMAGE_SIZES = {"binarynet": 32, "birealnet_small": 32}
"""Pixels of a side; 224 for other networks."""


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
    """Time the settings in turns; all their networks are in memory at the same time.

    Args:
        settings: each network after the reference that it is compared with.
        image_size: pixels of a side.
        device: where the networks are.
        num_rounds: turns of each setting.
        num_steps: steps per turn.

    Returns:
        A row per setting. peak_MB is what the network holds on a GPU between steps, and what a step
        adds; the first step compiles.
    """
    steps, held, first_seconds = [], [], []
    for setting in settings:
        before = _allocated(device)
        steps.append(setting_step(setting, image_size, device))
        first_seconds.append(seconds_per_call(steps[-1], 1, device))
        held.append(_allocated(device) - before)
    turns = {f"{i}": functools.partial(seconds_per_call, step, num_steps, device) for i, step in enumerate(steps)}
    seconds = list(interleave(turns, num_rounds).values())
    rows: list[Row] = []
    reference = seconds[0]
    for i, setting in enumerate(settings):
        reference = seconds[i] if setting.network == REFERENCE else reference
        quotients = ratios(reference, seconds[i])
        rows.append(
            {
                "what": setting.network,
                **setting._asdict(),
                "images_per_second": setting.batch_size / statistics.median(seconds[i]),
                "of_resnet18": statistics.median(quotients),
                "least": min(quotients),
                "most": max(quotients),
                "peak_MB": (held[i] + _added(steps[i], device)) / 1e6 if device.type == "cuda" else None,
                "first_step_seconds": first_seconds[i],
            }
        )
    for step in steps:
        step.close()
    return rows


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _added(step: TrainingStep, device: torch.device) -> int:
    """Return the bytes that a step adds, at its peak, to what is held between steps."""
    torch.cuda.reset_peak_memory_stats(device)
    before = _allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before
