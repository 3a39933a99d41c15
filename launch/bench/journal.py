"""What the flip journal costs: training steps with and without it in turns, and the encoding of made-up flips at any density."""

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bitfleet.launch.journal.reader import read_parts
from bitfleet.optim import is_binary
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.journal import JournalConfig, JournalWriter, open_journal
from bitfleet.trainer.journal.format import FRAME_BYTES, SIGNS, apply_, encode, parse_frame
from bitfleet.trainer.ranks.collectives import Ranks, barrier, from_first_rank, sum_of_numbers
from bitfleet.trainer.trainer import Trainer

FLIP_RATIOS = (0.5, 0.25, 0.1, 0.03, 0.01, 0.004, 0.0003)
"""Over a run, from its first step to its last; arXiv 2104.05124's schedules with Gaussian gradients."""
NUM_WEIGHTS = 10_985_472
"""Binary weights of Bi-Real Net 18, a multiple of 64."""


class Cost(NamedTuple):
    """Of `num_steps` training steps, a value a round, and what the journal took in the rounds that had one."""

    off: list[float]
    """Seconds without a journal."""
    on: list[float]
    """Seconds with one."""
    cpu_off: list[float]
    """Seconds of CPU time of this rank's process, which other work on the machine moves less."""
    cpu_on: list[float]
    num_steps: int
    num_weights: int
    num_flips: float
    """A step."""
    num_bytes: float
    """A step, over all ranks, without whole signs."""


class Encoding(NamedTuple):
    """Of one step of flips that do not know of each other."""

    flip_ratio: float
    num_bytes: int
    entropy_bytes: float
    encode_seconds: float
    decode_seconds: float


def bench_journal(config: TrainConfig, ranks: Ranks, device: torch.device, *, num_rounds: int, num_steps: int) -> Cost:
    """Measure `num_steps` steps without and with a journal, `num_rounds` times after a round that does not count.

    Steps with a journal end when it is on the disk, flushed: what its thread takes from the cores is in them.

    Raises:
        ValueError: no weights of the run are kept as bits.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(from_first_rank(folder)) / "run"
        config = dataclasses.replace(config, run_dir=run, resume=None, journal=JournalConfig())
        trainer = Trainer(config, ranks, device)
        if (needed := 2 * (num_rounds + 1) * num_steps) > trainer.num_steps:
            raise ValueError(
                f"the run has {trainer.num_steps:,} steps, the benchmark makes {needed:,}: fewer --steps or --rounds"
            )
        trainer.start()
        off: list[tuple[float, float]] = []
        on: list[tuple[float, float]] = []
        for count in range(num_rounds + 1):
            for enabled in (False, True) if count % 2 else (True, False):
                journal = open_journal(True, run, ranks, trainer.sharded) if enabled else None
                (on if enabled else off).append(_seconds(trainer, num_steps, device, journal))
                if journal is not None:
                    journal.close()
        trainer.stop()
        barrier()
        mine = [file for part in read_parts(run)[1:] for file in part.files if file.layout.rank == ranks.rank]
        frames = [frame for file in mine for frame in file.frames if frame.kind != SIGNS]
        flips = sum_of_numbers(sum(frame.num_flips for frame in frames)) / (num_rounds * num_steps)
        size = sum_of_numbers(sum(FRAME_BYTES + frame.length for frame in frames)) / (num_rounds * num_steps)
        num_weights = sum(param.numel() for param in trainer.model.parameters() if is_binary(param))
        barrier()
    seconds = [list(values) for measured in (off, on) for values in zip(*measured[1:], strict=True)]
    return Cost(seconds[0], seconds[2], seconds[1], seconds[3], num_steps, num_weights, flips, size)


def _seconds(
    trainer: Trainer, num_steps: int, device: torch.device, journal: JournalWriter | None
) -> tuple[float, float]:
    """Seconds, and of CPU time."""
    barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        trainer.train_step()  # without logging steps, which might fall on one side more often
    if journal is not None:
        journal.flush()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    barrier()
    return time.perf_counter() - start, time.process_time() - cpu_start


def encodings(num_weights: int = NUM_WEIGHTS, flip_ratios: Sequence[float] = FLIP_RATIOS) -> list[Encoding]:
    """What a step takes at each of `flip_ratios`, as one rank that owns all `num_weights` (a multiple of 8) has it."""
    generator = np.random.default_rng(0)
    found = []
    for ratio in flip_ratios:
        flips = np.packbits(generator.random(num_weights) < ratio, bitorder="little")
        encode_seconds, decode_seconds = [], []
        for _ in range(3):
            start = time.perf_counter()
            frame = encode(1, flips)
            encode_seconds.append(time.perf_counter() - start)
            facts = parse_frame(frame[:FRAME_BYTES], 0)
            assert facts is not None
            signs = np.zeros_like(flips)
            start = time.perf_counter()
            apply_(signs, facts.kind, facts.num_flips, frame[FRAME_BYTES:])
            decode_seconds.append(time.perf_counter() - start)
            assert np.array_equal(signs, flips), ratio
        bits = -(ratio * math.log2(ratio) + (1 - ratio) * math.log2(1 - ratio))
        found.append(Encoding(ratio, len(frame), bits * num_weights / 8, min(encode_seconds), min(decode_seconds)))
    return found


def format_journal(name: str, ranks: Ranks, cost: Cost, rows: Sequence[Encoding]) -> str:
    """Both measurements as text."""
    lines = [
        f"{name} on {ranks.world_size} ranks, {cost.num_weights:,} binary weights, median of {len(cost.on)} rounds of "
        f"{cost.num_steps} steps",
        f"  {'':24}{'without ms':>12}{'with ms':>12}{'ratio':>9}  of the middle half of the rounds",
        _row("step", cost.off, cost.on, cost.num_steps),
        _row("CPU time of rank 0", cost.cpu_off, cost.cpu_on, cost.num_steps),
        f"  flips a step              {cost.num_flips:10,.0f} ({cost.num_flips / cost.num_weights:.4%})",
        f"  bytes a step              {cost.num_bytes:10,.0f}",
        "",
        f"made-up flips of {NUM_WEIGHTS:,} weights in one process, best of 3",
        f"{'flip ratio':>12}{'bytes':>12}{'over entropy':>14}{'encode ms':>12}{'decode ms':>12}",
    ]
    for row in rows:
        over = row.num_bytes / row.entropy_bytes
        times = f"{1e3 * row.encode_seconds:12.1f}{1e3 * row.decode_seconds:12.1f}"
        lines.append(f"{row.flip_ratio:12.4%}{row.num_bytes:12,}{over:14.3f}{times}")
    return "\n".join(lines)


def _row(title: str, off: Sequence[float], on: Sequence[float], num_steps: int) -> str:
    ratios = sorted(a / b for a, b in zip(on, off, strict=True))
    without, with_ = (1e3 * statistics.median(values) / num_steps for values in (off, on))
    quarter = len(ratios) // 4
    return (
        f"  {title:24}{without:12.2f}{with_:12.2f}{statistics.median(ratios):9.4f}  "
        f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}"
    )
