"""What small images cost: bitfleet's loaders on CIFAR-10's sizes, with images that are read again and images in memory.

Each gives binarynet_cifar10's training windows: of 32 x 32 pixels in images padded by 4 to 40, half of them mirrored. The files
are PNGs of 32 pixels in the page cache.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from bitfleet.launch.bench.loader import take_turn
from bitfleet.launch.bench.loader_contenders import Contender
from bitfleet.launch.bench.loader_table import Turn
from bitfleet.trainer.data import DataConfig, TrainLoader, open_dataset

Loader = Literal["dali", "torch", "memory"]
LOADERS: tuple[Loader, ...] = ("dali", "torch", "memory")
LEAST_RATE = 60_000
"""Images/s that images in memory are to give, on two threads."""
_SIZE = 32
_NUM_CLASSES = 10
_TURN_SECONDS = 0.5  # about; how many batches that is, is found out first
_WARM_UP_BATCHES = 10


class SmallResult(NamedTuple):
    """What `bench_small_images` measures."""

    num_images: int
    batch_size: int
    num_workers: int
    turns: dict[str, list[Turn]]
    """A value per round for each of LOADERS."""


def bench_small_images(*, num_images: int, num_rounds: int, batch_size: int, num_workers: int) -> SmallResult:
    """Measure every loader in turns, each once per round, in an order that rotates.

    Args:
        num_images: Files that are made up.
        num_rounds: Turns of a loader.
        batch_size: Images in a batch.
        num_workers: Threads that decode, and threads of torch.

    Raises:
        ValueError: A batch is larger than the set.
    """
    if batch_size > num_images:
        raise ValueError(
            f"--batch_size {batch_size} must not exceed --images {num_images}; lower it, or raise --images"
        )
    torch.set_num_threads(num_workers)
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-loader-") as name:
        root = write_small_images(Path(name), num_images)
        contenders = [
            Contender(loader, functools.partial(_batches, root, loader, batch_size, num_workers)) for loader in LOADERS
        ]
        counts = {each.title: _batches_per_turn(each) for each in contenders}
        turns: dict[str, list[Turn]] = {each.title: [] for each in contenders}
        for count in range(num_rounds):
            first = count % len(contenders)
            for each in contenders[first:] + contenders[:first]:
                turns[each.title].append(take_turn(each, counts[each.title], batch_size))
    return SmallResult(num_images, batch_size, num_workers, turns)


def write_small_images(root: Path, num_images: int) -> Path:
    """Write images of 32 x 32 pixels in ten class folders, and one validation image per class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_images), ("val", _NUM_CLASSES)):
        for index in range(count):
            folder = root / split / str(index % _NUM_CLASSES)
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC), np.int16)
            pixels = np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:06d}.png")
    return root


def format_small_images(result: SmallResult) -> str:
    """The table: medians over the rounds with the least and the most, and the ratio to the first loader."""
    num_rounds = len(result.turns[LOADERS[0]])
    lines = [
        f"{result.num_images:,} images of {_SIZE} pixels, batches of {result.batch_size}, {result.num_workers} threads, median "
        f"of {num_rounds} rounds (least - most)",
        f"  {'data.loader':14}{'images/s':>30}{'CPU us/image':>26}{'images/s to dali':>20}",
    ]
    for loader, turns in result.turns.items():
        rates, costs = [turn.images_per_second for turn in turns], [1e3 * turn.cpu_ms for turn in turns]
        pairs = zip(rates, (turn.images_per_second for turn in result.turns[LOADERS[0]]), strict=True)
        ratio = statistics.median(rate / dali for rate, dali in pairs)
        lines.append(f"  {loader:14}{_spread(rates, ',.0f'):>30}{_spread(costs, '.1f'):>26}{ratio:20.1f}")
    rate = statistics.median(turn.images_per_second for turn in result.turns["memory"])
    lines.append(f"  memory: {rate:,.0f} images/s (at least {LEAST_RATE:,} on two threads that are free)")
    return "\n".join(lines)


def _batches(root: Path, loader: Loader, batch_size: int, num_workers: int) -> Iterator[object]:
    config = DataConfig(root=str(root), image_size=_SIZE, device="cpu", num_threads=num_workers, loader=loader)
    return TrainLoader(
        open_dataset(config),
        config,
        seed=0,
        global_batch_size=batch_size,
        num_replicas=1,
        rank=0,
        world_size=1,
        local_world_size=1,
        device=torch.device("cpu"),
    ).batches()


def _batches_per_turn(contender: Contender) -> int:
    """As many as take about _TURN_SECONDS."""
    batches = contender.batches()
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _TURN_SECONDS:
        next(batches)
        count += 1
    return count


def _spread(values: list[float], form: str) -> str:
    middle, least, most = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} - {most})"
