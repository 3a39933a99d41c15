"""`bitfleet sweep`: run every point of a sweep with every seed."""

import dataclasses
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from bitfleet.launch.parsing.commands import Count, MaybeCount, parse_with_run

if TYPE_CHECKING:
    from bitfleet.configs.sweeps.sweep import PlannedRun, Sweep


@dataclasses.dataclass(frozen=True)
class SweepCommand:
    """Run every point of a sweep with every seed, as many runs at once as fit; without NAME, list
    the sweeps.

    Started again, it keeps finished runs, continues stopped ones and retries failed ones once.
    After Ctrl-C or SIGTERM all runs save and end, exit code 75. A run that fails twice is recorded
    with its reason and the others continue, exit code 1. Further options, as --epochs 3 or
    --data.root FOLDER, are those of a run, and apply to all of them.
    """

    name: Positional[str] = ""
    """Name of the sweep."""
    print_only: Annotated[bool, tyro.conf.arg(name="print")] = False
    """Only show the points and their commands."""
    config: str | None = None
    """Configuration that the points change. Default: that of the sweep."""
    seeds: str | None = None
    """Seeds, as 0,1,2. Default: those of the sweep. Seeds of earlier starts stay in sweep.csv."""
    output: Path = Path("runs/sweeps")
    """The runs and sweep.csv are below OUTPUT/NAME."""
    ranks: Count = 1
    """Ranks per run; with GPUs one for each."""
    at_once: MaybeCount = None
    """Runs at once. Default: as many as cores, memory and GPUs allow."""


def sweep(arguments: Sequence[str]) -> None:
    """List the sweeps, or run one.

    Raises:
        ValueError: bad input.
        SystemExit: with the exit code of the sweep.
    """
    options: SweepCommand
    options, rest = parse_with_run(SweepCommand, arguments, "bitfleet sweep")
    if not arguments:
        print(listing())
        return
    if arguments[0].startswith("-"):
        raise ValueError(f"which sweep? Its name comes first, before {arguments[0]}; `bitfleet sweep` lists them")
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"one sweep at a time: {options.name!r} or {rest[0]!r}?")
    from bitfleet.configs.sweeps import load_sweep
    from bitfleet.configs.sweeps.sweep import plan_runs, with_threads
    from bitfleet.launch.parsing.arguments import parse_train
    from bitfleet.launch.sweep.run import run_sweep
    from bitfleet.launch.sweep.slots import find_slots
    from bitfleet.trainer.engine.arithmetic import remark_on_precision

    chosen = load_sweep(options.name)
    seeds = chosen.seeds if options.seeds is None else read_seeds(options.seeds)
    chosen = dataclasses.replace(chosen, base=options.config or chosen.base, seeds=seeds)
    folder = options.output / options.name
    planned = plan_runs(chosen, folder, rest, lambda words: parse_train(words, "bitfleet sweep"))
    slots = find_slots([run.config for run in planned], options.ranks, options.at_once)
    runs = [with_threads(run, slots.threads) for run in planned]
    print(
        f"{chosen.title}\n{entry(chosen)}: {len(runs)} runs, {len(slots.environments)} at once ({slots.reason})",
        flush=True,
    )
    device_type = "cuda" if any(slots.environments) else "cpu"
    for precision in sorted({run.config.engine.precision for run in runs}):
        if remark := remark_on_precision(precision, device_type):
            print(remark, flush=True)
    commands = {run.name: words_of(run, options.ranks) for run in runs}
    if options.print_only:
        for name, words in commands.items():
            print(f"\n{name}\n  {shlex.join(['bitfleet', *words])}")
        return
    program = (sys.executable, "-m", "bitfleet.launch")
    sys.exit(
        run_sweep(
            chosen, runs, folder, lambda run: (*program, *commands[run.name]), slots.environments, rest, options.ranks
        )
    )


def entry(known: "Sweep") -> str:
    """Return the question of a sweep, and its number of points and seeds."""
    return f"{known.question}\n{len(known.points)} points x {len(known.seeds)} seed(s) on {known.base}"


def listing() -> str:
    """Return every sweep with its question and its number of points and seeds."""
    from bitfleet.configs.sweeps import available_sweeps, load_sweep

    return "\n".join(f"{name}\n{textwrap.indent(entry(load_sweep(name)), '    ')}" for name in available_sweeps())


def words_of(run: "PlannedRun", ranks: int) -> tuple[str, ...]:
    """Return the words after `bitfleet` that start a run on `ranks` ranks."""
    return ("train", *run.arguments) if ranks == 1 else ("launch", "deepspeed", "--gpus", str(ranks), *run.arguments)


def read_seeds(text: str) -> tuple[int, ...]:
    """Return "0,1,2" as numbers.

    Raises:
        ValueError: it is something else.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--seeds must be numbers with commas between them, as in 0,1,2, not {text!r}")
    return tuple(int(word) for word in words)
