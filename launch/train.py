"""Train: `deepspeed --num_accelerators 2 launch/train.py --config NAME [--section.field value
...]`.

The same file runs under torchrun, as `python -m bitfleet.launch.train`, and alone as one rank.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bitfleet.launch.job import command_line, is_main_rank, job, run
from bitfleet.launch.parsing.arguments import HELP, parse_train
from bitfleet.launch.parsing.commands import parse_with_run
from bitfleet.launch.prepared import prepared_trainer, say_stopped
from bitfleet.trainer.ranks.exit_codes import REQUEUE


@dataclasses.dataclass(frozen=True)
class _Reproduce:
    reproduce: str | None = None


def train(arguments: Sequence[str], prog: str = "bitfleet train") -> None:
    """Parse `arguments` and train; `--reproduce NAME` instead of --config is `bitfleet reproduce
    NAME`, for every launcher.

    Raises:
        ValueError: bad input.
        SystemExit: with 75, if the run was asked to stop.
    """
    asked, rest = parse_with_run(_Reproduce, [a for a in arguments if a not in HELP], prog)
    if asked.reproduce is not None:
        from bitfleet.launch.reproduce.command import reproduce

        reproduce([asked.reproduce, *rest, *(word for word in arguments if word in HELP)])
        return
    config = parse_train(arguments, prog)
    with job(config.device, config) as (ranks, device):
        trainer = prepared_trainer(config, ranks, device)
        trainer.train()
        say_stopped(trainer)
        if is_main_rank():
            print(next_commands(trainer.folder.path, arguments, ranks.world_size), flush=True)
    if trainer.stopped_by:
        sys.exit(REQUEUE)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Options that a command which continues the run does not repeat."""

    resume: str | None = None
    run_dir: str | None = None
    stop_after_steps: str | None = None


def next_commands(run_folder: os.PathLike[str], arguments: Sequence[str], world_size: int) -> str:
    """Return the commands to view, evaluate and continue a run."""
    path = shlex.quote(str(run_folder))
    _, kept = parse_with_run(_Place, arguments, "bitfleet train")
    # With the folder of this interpreter in front: `make train` does not activate .venv in the
    # user's shell.
    folder = Path(sys.executable).parent
    tools = os.path.relpath(folder) + "/" if folder.is_relative_to(Path.cwd()) else ""
    start = "train" if world_size == 1 else f"launch deepspeed --gpus {world_size}"
    return (
        f"\nThe run is in {path}. Next:\n  {tools}tensorboard --logdir {path}/tensorboard\n  {tools}bitfleet evaluate "
        f"{path}\n  {tools}bitfleet {start} {shlex.join(kept)} --resume {path}"
    )


def main() -> None:
    """Entry point of the file."""
    run(lambda: train(command_line(), "launch/train.py"))


if __name__ == "__main__":
    main()
