"""Reproduce: `bitfleet reproduce NAME [...]`, on many ranks with `deepspeed --module bitfleet.launch reproduce NAME [...]`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitfleet.configs import load_config
from bitfleet.launch.job import is_first_rank, job
from bitfleet.launch.parsing.arguments import override
from bitfleet.launch.parsing.options import take_flag, take_option
from bitfleet.launch.prepared import prepared_trainer, say_stopped
from bitfleet.launch.reproduce.papers import PAPERS, Paper, dry_run_of, find_paper
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.ranks.exit_codes import REQUEUE
from bitfleet.trainer.run.user_paths import users_path

if TYPE_CHECKING:
    from bitfleet.launch.reproduce.verdict import Verdict
    from bitfleet.trainer.trainer import Trainer

USAGE = """usage: bitfleet reproduce {names} [--dry_run] [--section.field value ...]
       bitfleet reproduce NAME --check RUN [--dry_run]
       bitfleet launch deepspeed --reproduce NAME ...             all GPUs here, or --hostfile: `bitfleet launch --help`

  Starts or continues the paper's run, in runs/reproduce/NAME-seed-SEED unless --run_dir says where. After each validation one
  line compares it with the expected curve; at the end reproduce.md and reproduce.json in the run's folder hold the verdict, the
  numbers and what differs from the paper. A setting that changes the recipe makes the verdict "not a reproduction".
  --dry_run trains a miniature network on the embedded images instead (a minute). --check judges a folder without training.
  --data.root says where the images are. `bitfleet reproduce NAME --help` lists all options.

  Exit code 0 with any verdict, 75 if the run was stopped (the same command continues it). With --check, 1 if the verdict is "not
  reproduced" or "not a reproduction"."""


def reproduce(arguments: Sequence[str], prog: str = "bitfleet reproduce") -> None:
    """Train or check a run of the paper, and judge it.

    Raises:
        ValueError: bad input.
        SystemExit: 75 after a stop; 1 if --check finds that a run does not reproduce the paper.
    """
    own = [a for a in arguments if not a.startswith("--local_rank=")]
    if not own or own[0] in ("-h", "--help"):
        print(USAGE.format(names="|".join(PAPERS)))
        return
    checked, rest = take_option(own, "--check")
    paper, recipe, config = parse_reproduce(rest, prog)
    if checked is not None:
        if unknown := take_flag(rest[1:], "--dry_run")[1]:
            raise ValueError(f"--check judges a run as it is: leave out {' '.join(unknown)}")
        if is_first_rank() and tell_verdict(users_path(checked), paper, recipe).disagrees:
            sys.exit(1)
        return
    if config.resume == "auto" and config.run_dir is None:
        config = dataclasses.replace(config, run_dir=config.output / "reproduce" / f"{config.name}-seed-{config.seed}")
    trainer = _train(paper, recipe, config)
    if is_first_rank():
        if trainer.step == trainer.num_steps:
            tell_verdict(trainer.folder.path, paper, recipe)
        elif not trainer.stopped_by:
            print(
                f"\nStep {trainer.step:,} of {trainer.num_steps:,}: without --stop_after_steps the same command continues"
            )
        dry = " --dry_run" if paper.is_dry else ""
        print(f"\nLater: bitfleet reproduce {paper.name}{dry} --check {trainer.folder.path}", flush=True)
    if trainer.stopped_by:
        sys.exit(REQUEUE)


def parse_reproduce(arguments: Sequence[str], prog: str) -> tuple[Paper, TrainConfig, TrainConfig]:
    """NAME and options: what is to be reproduced, its recipe, and the run.

    Raises:
        ValueError: no name, an unknown name or option, or a value that does not fit.
        SystemExit: after --help.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"which run of the paper? Its name comes first, one of: {', '.join(PAPERS)}")
    name, *rest = arguments
    paper = find_paper(name)
    is_dry, rest = take_flag(rest, "--dry_run")
    paper = dry_run_of(paper) if is_dry else paper
    recipe = load_config(paper.config)
    default = dataclasses.replace(recipe, name=f"{name}-dry-run" if is_dry else name, resume="auto")
    about = f"Reproduce {paper.title}; the defaults below are those of the configuration {paper.config}."
    return paper, recipe, override(default, rest, prog=f"{prog} {name}", description=about)


def _train(paper: Paper, recipe: TrainConfig, config: TrainConfig) -> "Trainer":
    """Run it to its end or to a stop."""
    with job(config.device, config) as (ranks, device):
        from bitfleet.launch.reproduce.watch import announcement, watch

        trainer = prepared_trainer(config, ranks, device)
        if is_first_rank():
            print(announcement(paper, recipe, config), end="\n\n", flush=True)
            watch(trainer, paper)
        trainer.train()
        say_stopped(trainer, "the same command continues")
        return trainer


def tell_verdict(run_folder: Path, paper: Paper, recipe: TrainConfig) -> "Verdict":
    """Judge the run in `run_folder`, write its card and print the verdict."""
    from bitfleet.launch.reproduce.card import make_card, write_card
    from bitfleet.launch.reproduce.markdown import as_markdown

    card = make_card(run_folder, paper, recipe)
    _, markdown = write_card(card, as_markdown(card))
    print(f"\n{paper.title}: {card.verdict.kind}\n{card.verdict.sentence}\nThe card of the run: {markdown}", flush=True)
    return card.verdict
