"""Evaluate: `bitfleet evaluate RUN`, or on many ranks `deepspeed --num_accelerators 2 launch/evaluate.py RUN`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bitfleet.launch.arguments import one_sentence
from bitfleet.launch.environment import is_first_rank, job, run


@dataclasses.dataclass(frozen=True, slots=True)
class EvaluateArguments:
    """Print top-1 and top-5 of a run over every image of its validation set."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder (its newest checkpoint is taken) or one of its checkpoints."""
    data_root: str | None = None
    """Where the data is now. None: where the run read it."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the model runs; auto is CUDA where torch finds it."""


def evaluate(arguments: Sequence[str], prog: str = "launch/evaluate.py") -> None:
    """Parse `arguments` and evaluate.

    Raises:
        ValueError: bad input.
    """
    own = [a for a in arguments if not a.startswith("--local_rank=")]
    with one_sentence():
        options = tyro.cli(EvaluateArguments, prog=prog, args=own, console_outputs=is_first_rank())
    with job(options.device) as (ranks, device):
        from bitfleet.trainer.evaluate import evaluate_run

        checkpoint, accuracy = evaluate_run(options.run, data_root=options.data_root, ranks=ranks, device=device)
        if is_first_rank():
            print(f"{checkpoint}")
            print(
                f"top-1 {accuracy.top1:.2%}  top-5 {accuracy.top5:.2%}  loss {accuracy.loss:.4f}  {accuracy.num_images:,} images"
            )


def main() -> None:
    """Entry point of the file."""
    run(lambda: evaluate(sys.argv[1:]))


if __name__ == "__main__":
    main()
