"""Training steps of a network against timm's resnet18 on the same images, in turns: images/s and memory."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bitfleet.launch.bench.clock import seconds_per_call
from bitfleet.launch.bench.gpu.networks import REFERENCE, Setting, TrainingStep
from bitfleet.trainer.engine.config import Precision

IMAGE_SIZES = {"binarynet": 32, "birealnet_small": 32}
"""Pixels of a side; 224 for networks that are not here."""


class Row(NamedTuple):
    """A network in one setting."""

    setting: Setting
    first_seconds: float
    """Of the first step, which compiles."""
    rates: list[float]
    """Images/s, one value a round."""
    peak_bytes: int | None
    """The most that it holds at a time: weights, optimizer state and what a step adds. None on a CPU."""


class _Contender:
    """A training step in memory, next to others."""

    def __init__(self, setting: Setting, image_size: int, device: torch.device) -> None:
        self.setting, self._device = setting, device
        before = _allocated(device)
        self.step = TrainingStep(setting, image_size, device)
        self.first_seconds = seconds_per_call(self.step, 1, device)
        self._held = _allocated(device) - before

    def rate(self, num_steps: int) -> float:
        """Images/s over `num_steps` steps."""
        return self.setting.batch_size / seconds_per_call(self.step, num_steps, self._device)

    def peak_bytes(self) -> int | None:
        """What it holds between steps and what a step adds."""
        if self._device.type != "cuda":
            return None
        before = _allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        seconds_per_call(self.step, 1, self._device)
        return self._held + torch.cuda.max_memory_allocated(self._device) - before


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def bench_networks(
    network: str,
    precision: Precision,
    device: torch.device,
    *,
    compiled: bool,
    num_rounds: int,
    num_steps: int,
    batch_size: int | None = None,
    image_size: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure `network` and timm's resnet18 in turns, `num_rounds` times after a round that does not count.

    Args:
        network: name in timm's registry.
        precision: engine.precision of both.
        device: where they train; a process group of one rank exists.
        compiled: measure the compiled networks as well, each next to the eager ones.
        num_rounds: rounds that count.
        num_steps: steps of each in a round.
        batch_size: images; None: 50 for BinaryNet, as published, else 8 on a CPU and 128 on a GPU.
        image_size: pixels of a side; None: what the network takes.
        say: is told what is being built, because compiling takes a minute.

    Returns:
        resnet18 and `network`, eager, then compiled.
    """
    batch_size = batch_size or (50 if network == "binarynet" else 128 if device.type == "cuda" else 8)
    image_size = image_size or IMAGE_SIZES.get(network, 224)
    contenders = []
    for is_compiled in (False, True) if compiled else (False,):
        for name in (REFERENCE, network):
            say(f"{name}, {precision}, {'compiled' if is_compiled else 'eager'}: first step ...")
            contenders.append(_Contender(Setting(name, batch_size, precision, is_compiled), image_size, device))
    rates: list[list[float]] = []
    for _ in range(num_rounds + 1):
        rates.append([contender.rate(num_steps) for contender in contenders])
    rows = [
        Row(contender.setting, contender.first_seconds, list(found), contender.peak_bytes())
        for contender, found in zip(contenders, zip(*rates[1:], strict=True), strict=True)
    ]
    for contender in contenders:
        contender.step.close()
    return rows


def ratios(row: Row, rows: Sequence[Row]) -> list[float]:
    """Images/s of `row` over those of resnet18 in the same setting, round by round."""
    (reference,) = (each for each in rows if each.setting == row.setting._replace(network=REFERENCE))
    return [a / b for a, b in zip(row.rates, reference.rates, strict=True)]


def format_networks(rows: Sequence[Row], device: torch.device) -> str:
    """The rows as a table for a terminal: medians over the rounds."""
    first = rows[0].setting
    lines = [
        f"training steps of {first.batch_size} images, {first.precision}, {device.type} ({torch.get_num_threads()} threads), "
        f"median of {len(rows[0].rates)} rounds",
        f"  {'':<18}{'':<10}{'images/s':>10}{'of ' + REFERENCE:>13}{'(least to most)':>18}{'first step s':>14}{'peak MB':>9}",
    ]
    for row in rows:
        found = ratios(row, rows)
        lines.append(
            f"  {row.setting.network:<18}{'compiled' if row.setting.is_compiled else 'eager':<10}"
            f"{statistics.median(row.rates):10,.1f}{statistics.median(found):13.3f}"
            f"{f'({min(found):.3f} to {max(found):.3f})':>18}{row.first_seconds:14.1f}"
            f"{'' if row.peak_bytes is None else f'{row.peak_bytes / 1e6:,.0f}':>9}"
        )
    return "\n".join(lines)
