"""Training steps of a network against timm's resnet18 on the same images, in turns: images/s and memory.

A step is forward, loss, backward and update: bitfleet's sharded optimizer for its own networks, fused AdamW for any other. Data
lies in memory, one process measures.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.models import ModelConfig, compile_network, create_model
from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer
from bitfleet.trainer.engine import autocast
from bitfleet.trainer.engine_options import Precision

REFERENCE = "resnet18"
NUM_CLASSES = 1000
IMAGE_SIZES = {"binarynet": 32, "birealnet_small": 32}
"""Pixels of a side; 224 for networks that are not here."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


class Kind(NamedTuple):
    """What is compared like with like."""

    precision: Precision
    compiled: bool

    def __str__(self) -> str:
        return f"{self.precision} {'compiled' if self.compiled else 'eager'}"


@dataclasses.dataclass
class Row:
    """A network in one kind of run."""

    network: str
    kind: Kind
    first_seconds: float
    """Of the first step, which compiles."""
    rates: list[float]
    """Images/s, one value a round."""
    peak_bytes: int
    """On CUDA, at a time: weights, optimizer state and what a step adds; 0 elsewhere."""


class Contender:
    """A network, its optimizer and one batch.

    Args:
        network: name in timm's registry.
        kind: precision, and whether it is compiled.
        batch_size: images.
        image_size: pixels of a side.
        device: where it trains; a process group of one rank exists.
    """

    def __init__(self, network: str, kind: Kind, batch_size: int, image_size: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self._kind, self._device = kind, device
        shape = (batch_size, 3, image_size, image_size)
        self._images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(0, NUM_CLASSES, (batch_size,), device=device)
        before = self._allocated()
        self.model: nn.Module = create_model(ModelConfig(name=network, num_classes=NUM_CLASSES)).to(device).train()
        self._optimizer: torch.optim.Optimizer
        if any(getattr(param, "binary", False) for param in self.model.parameters()):
            plain, _ = build_optimizer(self.model, OptimConfig(), num_steps=1000)
            self._optimizer = ShardedOptimizer(plain, num_replicas=1)
        else:
            self.model.to(memory_format=torch.channels_last)
            self._optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        if kind.compiled:
            compile_network(self.model)
        self.first_seconds = self.seconds(1)
        self._held = self._allocated() - before

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def backward(self) -> None:
        """Forward and backward. The sharded optimizer takes the gradients, until `close`."""
        with autocast(self._device, self._kind.precision):
            logits: Tensor = self.model(self._images)
        torch.autograd.backward(nn.functional.cross_entropy(logits.float(), self._labels))

    def _step(self) -> None:
        self.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def seconds(self, num_steps: int) -> float:
        """Of a step, the mean over `num_steps`."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self._step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - start) / num_steps

    def peak_bytes(self) -> int:
        """On CUDA the most that this contender holds in a step, 0 elsewhere."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        before = self._allocated()
        self.seconds(1)
        return self._held + torch.cuda.max_memory_allocated(self._device) - before

    def close(self) -> None:
        """Take the optimizer's hooks off the network."""
        if isinstance(self._optimizer, ShardedOptimizer):
            self._optimizer.close()


def bench_networks(
    network: str,
    kinds: Sequence[Kind],
    device: torch.device,
    *,
    num_rounds: int,
    num_steps: int,
    batch_size: int | None = None,
    image_size: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure `network` and timm's resnet18 in turns, `num_rounds` times after a round that does not count.

    Args:
        network: name in timm's registry.
        kinds: what to measure; each kind of both networks is a contender, all are in memory together.
        device: where they train.
        num_rounds: rounds that count.
        num_steps: steps of a contender in each round.
        batch_size: images; None: 8 on a CPU, 128 on a GPU, 50 of BinaryNet.
        image_size: pixels of a side; None: what the network takes.
        say: is told what is being built, because compiling takes a minute.

    Returns:
        A row for each contender, resnet18 before `network`.
    """
    batch_size = batch_size or (50 if network == "binarynet" else 128 if device.type == "cuda" else 8)
    image_size = image_size or IMAGE_SIZES.get(network, 224)
    contenders: dict[tuple[str, Kind], Contender] = {}
    for kind in kinds:
        for name in (REFERENCE, network):
            say(f"{name}, {kind} ...")
            contenders[name, kind] = Contender(name, kind, batch_size, image_size, device)
    rates: dict[tuple[str, Kind], list[float]] = {key: [] for key in contenders}
    for count in range(num_rounds + 1):
        for key, contender in contenders.items():
            seconds = contender.seconds(num_steps)
            if count > 0:
                rates[key].append(batch_size / seconds)
    rows = [
        Row(name, kind, contender.first_seconds, rates[name, kind], contender.peak_bytes())
        for (name, kind), contender in contenders.items()
    ]
    for contender in contenders.values():
        contender.close()
    return rows


def ratios(row: Row, rows: Sequence[Row]) -> list[float]:
    """Images/s of `row` over those of resnet18 of the same kind, round by round."""
    (reference,) = (each for each in rows if each.network == REFERENCE and each.kind == row.kind)
    return [a / b for a, b in zip(row.rates, reference.rates, strict=True)]


def format_networks(rows: Sequence[Row], device: torch.device) -> str:
    """The rows as a table for a terminal: medians over the rounds."""
    lines = [
        f"training steps on {device.type}, {torch.get_num_threads()} threads, median of {len(rows[0].rates)} rounds",
        f"  {'':<18}{'':<16}{'images/s':>10}{'of ' + REFERENCE:>13}{'(least to most)':>18}{'first step s':>14}{'peak MB':>9}",
    ]
    for row in rows:
        found = ratios(row, rows)
        peak = f"{row.peak_bytes / 1e6:9,.0f}" if row.peak_bytes else f"{'':>9}"
        lines.append(
            f"  {row.network:<18}{row.kind!s:<16}{statistics.median(row.rates):10,.1f}{statistics.median(found):13.3f}"
            f"{f'({min(found):.3f} to {max(found):.3f})':>18}{row.first_seconds:14.1f}{peak}"
        )
    return "\n".join(lines)
