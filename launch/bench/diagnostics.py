"""What the diagnostics of bits cost: the training loop of one run with and without them, in turns in the same processes."""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.metrics import JSONL
from bitfleet.trainer.ranks.collectives import Ranks, barrier, from_first_rank
from bitfleet.trainer.trainer import Trainer


class Turn(NamedTuple):
    """Of one loop in one round, for a step."""

    seconds: float
    cpu_seconds: float
    """Of all threads of this rank; other work on the machine hardly changes it."""


class Cost(NamedTuple):
    """One value a round."""

    without: list[Turn]
    with_diagnostics: list[Turn]
    line_bytes: int
    """Of a report in metrics.jsonl; 0 but on rank 0."""

    def ratios(self) -> list[Turn]:
        """With / without, of each round."""
        pairs = zip(self.with_diagnostics, self.without, strict=True)
        return [Turn(a.seconds / b.seconds, a.cpu_seconds / b.cpu_seconds) for a, b in pairs]


def bench_diagnostics(
    config: TrainConfig, ranks: Ranks, device: torch.device, *, num_rounds: int, num_steps: int
) -> Cost:
    """Measure both loops in turns, `num_steps` steps each, `num_rounds` times after a round that does not count.

    Reports, their files and TensorBoard are in both. Which loop is first changes from round to round.

    Raises:
        ValueError: `num_steps` is no multiple of metrics.every_steps, so that the turns would not report equally often; or
            the run has fewer steps than both loops make.
    """
    every = config.metrics.every_steps
    if num_steps < 1 or num_steps % every:
        raise ValueError(f"--steps is {num_steps}, expected a multiple of metrics.every_steps, which is {every}")
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            _make(config, ranks, device, Path(from_first_rank(folder)) / f"run{number}", bool(number))
            for number in range(2)
        ]
        if (needed := (num_rounds + 1) * num_steps) > (available := trainers[0].num_steps):
            raise ValueError(
                f"the run has {available:,} steps, the benchmark makes {needed:,} of each loop: fewer --steps or --rounds"
            )
        for trainer in trainers:
            trainer.start()
        turns: list[list[Turn]] = [[], []]
        for count in range(num_rounds + 1):
            for number in (0, 1) if count % 2 else (1, 0):
                turn = _turn(trainers[number], device, num_steps)
                if count > 0:
                    turns[number].append(turn)
        for trainer in trainers:
            trainer.stop()
        size = 0
        if ranks.is_first:
            last = (trainers[1].folder.path / JSONL).read_text().splitlines()[-1]
            assert json.loads(last)["kind"] == "diagnostics", last
            size = len(last)
        barrier()
    return Cost(turns[0], turns[1], size)


def _make(config: TrainConfig, ranks: Ranks, device: torch.device, run_dir: Path, diagnostics: bool) -> Trainer:
    metrics = dataclasses.replace(config.metrics, diagnostics=diagnostics)
    return Trainer(dataclasses.replace(config, metrics=metrics, run_dir=run_dir, resume=None), ranks, device)


def _turn(trainer: Trainer, device: torch.device, num_steps: int) -> Turn:
    barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        trainer.advance()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu_seconds = time.process_time() - cpu_start
    barrier()
    return Turn((time.perf_counter() - start) / num_steps, cpu_seconds / num_steps)


def format_diagnostics(config: TrainConfig, ranks: Ranks, cost: Cost) -> str:
    """The result for a terminal."""
    ratios = cost.ratios()
    lines = [
        f"{config.name}, {config.model.name}, {ranks.world_size} ranks, a report every {config.metrics.every_steps} steps; "
        f"a step, medians of {len(ratios)} rounds",
        f"  {'':<22}{'without':>12}{'with':>12}{'ratio':>10}   quartiles of the ratio",
    ]
    for name, place in (("ms", 0), ("CPU ms of rank 0", 1)):
        without, with_them = (
            1e3 * statistics.median(turn[place] for turn in turns) for turns in (cost.without, cost.with_diagnostics)
        )
        values = [ratio[place] for ratio in ratios]
        low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else 3 * values
        lines.append(
            f"  {name:<22}{without:12,.2f}{with_them:12,.2f}{statistics.median(values):10.4f}   {low:.4f} to {high:.4f}"
        )
    return "\n".join([*lines, f"  a line of them in metrics.jsonl: {cost.line_bytes:,} bytes"])
