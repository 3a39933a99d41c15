"""Train: `deepspeed --num_accelerators 2 launch/train.py --config NAME [--section.field value ...]`.

The same file runs under torchrun, as `python -m bitfleet.launch.train`, and alone as one rank.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitfleet.launch.job import REQUEUE, command_line, is_first_rank, job, run
from bitfleet.launch.parsing.arguments import HELP, parse_train
from bitfleet.launch.parsing.commands import parse_with_run

if TYPE_CHECKING:  # torch takes seconds to import; a misspelt option should not wait for it
    import torch

    from bitfleet.trainer.config import TrainConfig
    from bitfleet.trainer.ranks.collectives import Ranks
    from bitfleet.trainer.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class _Reproduce:
    reproduce: str | None = None


def train(arguments: Sequence[str], prog: str = "bitfleet train") -> None:
    """Parse `arguments` and train; `--reproduce NAME` instead of --config is `bitfleet reproduce NAME`, for every launcher.

    Raises:
        ValueError: bad input.
        SystemExit: with 75, if the run was asked to stop.
    """
    asked, rest = parse_with_run(_Reproduce, [a for a in arguments if a not in HELP], prog)
    if asked.reproduce is not None:
        from bitfleet.launch.reproduce.command import reproduce

        reproduce([asked.reproduce, *rest])
        return
    config = parse_train(arguments, prog)
    with job(config.device, config) as (ranks, device):
        trainer = prepared_trainer(config, ranks, device)
        trainer.train()
        say_stopped(trainer)
        if is_first_rank():
            print(next_commands(trainer.folder.path, arguments, ranks.world_size), flush=True)
    if trainer.stopped_by:
        sys.exit(REQUEUE)


def prepared_trainer(config: "TrainConfig", ranks: "Ranks", device: "torch.device") -> "Trainer":
    """The trainer of the run, after rank 0 has said what it will do and take.

    Raises:
        ValueError: bad input.
    """
    from bitfleet.launch.preflight.preflight import Preflight
    from bitfleet.launch.preflight.rehearsal import rehearse
    from bitfleet.trainer.trainer import Trainer

    if config.preflight == "full":
        rehearse(config, ranks, device)
    trainer = Trainer(config, ranks, device)
    if is_first_rank():
        print(trainer.routing)
        print(f"data: {trainer.dataset.summary()}")
        state = f"continues {trainer.begun.path}" if trainer.begun else "starts"
        if trainer.step >= trainer.num_steps:
            state = (
                f"is finished (to train on from its weights, pass another --run_dir and --init {trainer.folder.path})"
            )
        elif config.stop_after_steps and trainer.step >= config.stop_after_steps:
            state = f"is at step {trainer.step:,}, past --stop_after_steps {config.stop_after_steps:,}: nothing is to be done"
        print(
            f"run {trainer.folder.path} {state}: {trainer.num_steps:,} steps on {ranks.world_size} "
            f"rank{'s' * (ranks.world_size > 1)} ({device.type}, {trainer.config.engine.precision})"
        )
        if device.type == "cuda" and not config.engine.deterministic:
            print("engine.deterministic is off: the same run again, or continued, may end with other bits")
    cost = trainer.checkpoints.cost()
    if is_first_rank():
        preflight = Preflight(trainer)
        trainer.around_step = preflight.around_step
        print(cost, preflight.report(), sep="\n", end="\n\n", flush=True)
    return trainer


def say_stopped(trainer: "Trainer", again: str = "the same command with --resume auto continues") -> None:
    """Say on rank 0 that the run was asked to stop, if it was, and what continues it."""
    if is_first_rank() and trainer.stopped_by:
        print(
            f"\nbitfleet: stopped by {trainer.stopped_by} after step {trainer.step:,}; saved "
            f"{trainer.seconds_to_stop:.1f} s after it; exit code {REQUEUE}: {again}"
        )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Options that a command which continues the run does not repeat."""

    resume: str | None = None
    run_dir: str | None = None
    stop_after_steps: str | None = None


def next_commands(run_folder: os.PathLike[str], arguments: Sequence[str], world_size: int) -> str:
    """What to do after a run: look at it, evaluate it, continue it."""
    path = shlex.quote(str(run_folder))
    _, kept = parse_with_run(_Place, arguments, "bitfleet train")
    # With the folder of this interpreter in front: `make train` does not activate .venv in the user's shell.
    folder = Path(sys.executable).parent
    tools = os.path.relpath(folder) + "/" if folder.is_relative_to(Path.cwd()) else ""
    return (
        f"\nThe run is in {path}. Next:\n"
        f"  {tools}tensorboard --logdir {path}/tensorboard\n"
        f"  {tools}bitfleet evaluate {path}\n"
        f"  {tools}deepspeed --num_accelerators {world_size} launch/train.py {shlex.join(kept)} --resume {path}"
    )


def main() -> None:
    """Entry point of the file."""
    run(lambda: train(command_line(), "launch/train.py"))


if __name__ == "__main__":
    main()
