"""Sweep: `bitfleet sweep NAME [--config BASE] [--seeds 0,1,2] [--ranks 1] [--at_once N] [--section.field value ...]`."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitfleet.launch.job import num_cores
from bitfleet.launch.parsing.options import take_flag, take_number, take_option
from bitfleet.trainer.run.user_paths import users_path

if TYPE_CHECKING:
    from bitfleet.configs.sweeps.sweep import PlannedRun, Sweep
    from bitfleet.launch.sweep.slots import Slots
    from bitfleet.trainer.config import TrainConfig

USAGE = """usage: bitfleet sweep NAME [options] [--section.field value ...]

Run every point of a sweep with every seed, as many at once as fit. Started again, finished runs are kept, stopped ones continued
and failed ones tried once more. Ctrl-C or SIGTERM: all runs save and end, exit code 75. A run that fails twice is noted with its
reason, the others go on, exit code 1. Options with a dot are for all runs.

  --config BASE    the configuration that the points change (the sweep's own)
  --seeds 0,1,2    seeds (the sweep's own); those that were run before stay in sweep.csv
  --ranks N        ranks of a run; with GPUs one for each (1)
  --at_once N      runs at once (as many as cores, memory and GPUs allow)
  --output FOLDER  the runs and sweep.csv are below FOLDER/NAME (runs/sweeps)
  --print          only show the points and their commands"""


def sweep(arguments: Sequence[str]) -> None:
    """List the sweeps, or run the one that `arguments` ask for.

    Raises:
        ValueError: bad input.
        SystemExit: with the exit code of the sweep.
    """
    if "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return
    if not arguments:
        print(f"{USAGE}\n\n{listing()}")
        return
    name, *rest = arguments
    if name.startswith("-"):
        raise ValueError(f"which sweep? Its name comes first, before {name}; `bitfleet sweep` lists them")
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"one sweep at a time: {name!r} or {rest[0]!r}?")
    only_print, rest = take_flag(rest, "--print")
    base, rest = take_option(rest, "--config")
    seeds, rest = take_option(rest, "--seeds")
    output, rest = take_option(rest, "--output")
    ranks, rest = take_number(rest, "--ranks", 1)
    at_once, rest = take_number(rest, "--at_once", 0)

    from bitfleet.configs.sweeps import load_sweep
    from bitfleet.configs.sweeps.sweep import plan_runs, with_threads
    from bitfleet.launch.parsing.arguments import parse_train
    from bitfleet.launch.sweep.run import run_sweep

    asked = load_sweep(name)
    asked = dataclasses.replace(
        asked, base=base or asked.base, seeds=asked.seeds if seeds is None else read_seeds(seeds)
    )
    folder = users_path(output or "runs/sweeps") / name
    planned = plan_runs(asked, folder, rest, lambda words: parse_train(words, "bitfleet sweep"))
    slots = slots_here([run.config for run in planned], ranks, at_once or None)
    runs = [with_threads(run, slots.threads) for run in planned]
    print(describe(asked, len(runs), len(slots.environments), slots.reason), flush=True)
    if only_print:
        for run in runs:
            print(f"\n{run.name}\n  {shlex.join(['bitfleet', *words_of(run, ranks)])}")
        return

    def command(run: "PlannedRun") -> tuple[str, ...]:
        return (sys.executable, "-m", "bitfleet.launch.cli", *words_of(run, ranks))

    sys.exit(run_sweep(asked, runs, folder, command, slots.environments, rest))


def listing() -> str:
    """Every sweep with its question and its number of runs."""
    from bitfleet.configs.sweeps import available_sweeps, load_sweep

    lines = []
    for name in available_sweeps():
        each = load_sweep(name)
        lines.append(
            f"{name}\n    {each.question}\n    {len(each.points)} points x {len(each.seeds)} seed(s) on {each.base}"
        )
    return "\n".join(lines)


def describe(asked: "Sweep", num_runs: int, at_once: int, reason: str) -> str:
    """What is going to be run, in lines."""
    return (
        f"{asked.title}\n{asked.question}\n{len(asked.points)} points x {len(asked.seeds)} seed(s) on {asked.base}: "
        f"{num_runs} runs, {at_once} at once ({reason})"
    )


def words_of(run: "PlannedRun", ranks: int) -> tuple[str, ...]:
    """The words after `bitfleet` that start a run on `ranks` ranks."""
    return ("train", *run.arguments) if ranks == 1 else ("launch", "deepspeed", "--gpus", str(ranks), *run.arguments)


def slots_here(configs: Sequence["TrainConfig"], ranks: int, at_once: int | None) -> "Slots":
    """The places on this machine for runs of `configs`; each fits the largest of them.

    Raises:
        ValueError: there are not enough GPUs, or the run cannot be built.
    """
    import torch

    from bitfleet.launch.doctor.facts import free_memory
    from bitfleet.launch.sweep.slots import bytes_of_largest, find_slots

    gpus: list[str] = []
    if any(config.device != "cpu" for config in configs) and torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    return find_slots(
        ranks=ranks,
        threads=max((config.num_threads for config in configs if config.num_threads), default=None),
        at_once=at_once,
        cores=num_cores(),
        free_bytes=free_memory(),
        rank_bytes=bytes_of_largest(configs, ranks),
        gpus=gpus,
    )


def read_seeds(text: str) -> tuple[int, ...]:
    """ "0,1,2" as numbers.

    Raises:
        ValueError: it is something else.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--seeds must be numbers with commas between them, as in 0,1,2, not {text!r}")
    return tuple(int(word) for word in words)
