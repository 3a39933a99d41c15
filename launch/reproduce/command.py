"""`bitfleet reproduce`: train the paper's runs, and judge them against its numbers."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from bitfleet.launch.job import is_main_rank, job
from bitfleet.launch.parsing.commands import parse_with_run
from bitfleet.launch.prepared import prepared_trainer, say_stopped
from bitfleet.launch.reproduce.papers import PAPERS, Paper, find_paper
from bitfleet.trainer.ranks.exit_codes import REQUEUE

if TYPE_CHECKING:
    from bitfleet.trainer.config import TrainConfig

PROG = "bitfleet reproduce"
HELP = {"-h", "--help"}


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Start or continue a run of the paper, in runs/reproduce/NAME-seed-SEED if --run_dir is unset.

    Options of the run may follow, such as --data.root, the folder of the images; `bitfleet
    reproduce NAME --help` lists all. One line per validation compares it with the expected curve;
    at the end reproduce.md and reproduce.json in the run's folder hold the verdict, the numbers and
    the differences. A setting that changes the recipe makes the verdict "not a reproduction".

    On all GPUs: `bitfleet launch deepspeed --reproduce NAME ...`. Exit code 0 with any verdict; 75
    after a stop (the same command continues); 1 if --check finds "not reproduced" or "not a
    reproduction".
    """

    name: Positional[str]
    """birealnet18, xnornet, binarynet, quicknet_small, quicknet or quicknet_large."""
    check: Path | None = None
    """Judge this run folder without training."""
    dry_run: bool = False
    """Train a miniature network on the embedded images instead (a minute)."""


def reproduce(arguments: Sequence[str]) -> None:
    """Train or check a run of the paper, and judge it.

    Raises:
        ValueError: bad input.
        SystemExit: 75 after a stop; 1 if --check finds that a run does not reproduce the paper.
    """
    options, paper, recipe, config = parse_reproduce(arguments)
    if options.check is not None:
        if is_main_rank() and _tell_verdict(options.check, paper, recipe):
            sys.exit(1)
        return
    if config.resume == "auto" and config.run_dir is None:
        config = dataclasses.replace(config, run_dir=config.output / "reproduce" / f"{config.name}-seed-{config.seed}")
    from bitfleet.launch.reproduce.curves import expected_curve, watcher
    from bitfleet.launch.reproduce.recipe import announcement

    with job(config.device, config) as (ranks, device):
        trainer = prepared_trainer(config, ranks, device)
        if is_main_rank():
            print(announcement(paper, recipe, config), end="\n\n", flush=True)
            trainer.after_validation = watcher(expected_curve(paper.config), config, trainer.loader.steps_per_epoch)
        trainer.train()
        say_stopped(trainer, "the same command continues")
    if is_main_rank():
        if trainer.step == trainer.num_steps:
            _tell_verdict(trainer.folder.path, paper, recipe)
        elif not trainer.stopped_by:
            left = "without --stop_after_steps the same command continues"
            print(f"\nStep {trainer.step:,} of {trainer.num_steps:,}: {left}")
        print(f"\nLater: {PROG} {paper.name}{' --dry_run' * paper.dry_run} --check {trainer.folder.path}", flush=True)
    if trainer.stopped_by:
        sys.exit(REQUEUE)


def parse_reproduce(arguments: Sequence[str]) -> tuple[Reproduce, Paper, "TrainConfig", "TrainConfig"]:
    """Return the options, the run of the paper, its recipe, and the configuration of the run.

    Raises:
        ValueError: no name, an unknown name or option, or a value that does not fit.
        SystemExit: after --help.
    """
    if arguments and arguments[0].startswith("-") and arguments[0] not in HELP:
        raise ValueError(f"which run of the paper? Its name comes first, one of: {', '.join(PAPERS)}")
    name, *words = arguments or ["--help"]
    options, rest = parse_with_run(Reproduce, [name, *(word for word in words if word not in HELP)], PROG)
    paper = find_paper(options.name, dry_run=options.dry_run)
    if options.check is not None and rest:
        raise ValueError(f"--check judges a run as it is: leave out {' '.join(rest)}")
    from bitfleet.configs import load_config
    from bitfleet.launch.parsing.arguments import override

    recipe = load_config(paper.config)
    default = dataclasses.replace(recipe, name=name + "-dry-run" * paper.dry_run, resume="auto")
    about = f"Reproduce {paper.title}; the defaults below are those of the configuration {paper.config}."
    rest += ["--help"] * bool(HELP & set(words))
    return options, paper, recipe, override(default, rest, prog=f"{PROG} {name}", description=about)


def _tell_verdict(run: Path, paper: Paper, recipe: "TrainConfig") -> bool:
    """Judge a run, write its card and print the verdict; return True if it disagrees."""
    from bitfleet.launch.reproduce.card import DISAGREES, make_card, read_record, write_card

    card = make_card(read_record(run), paper, recipe)
    path = write_card(run, card)
    print(f"\n{paper.title}: {card['verdict']}\n{card['sentence']}\nThe card of the run: {path}", flush=True)
    return card["verdict"] in DISAGREES
