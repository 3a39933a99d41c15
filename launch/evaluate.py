"""Evaluate: `bitfleet evaluate RUN`, or on many ranks `deepspeed --num_accelerators 2
launch/evaluate.py RUN`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from bitfleet.launch.job import command_line, is_main_rank, job, run
from bitfleet.launch.parsing.commands import MaybeCountOrZero, parse

if TYPE_CHECKING:  # torch takes seconds to import; a misspelt option should not wait for it
    from bitfleet.trainer.evaluate import Evaluation


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluate:
    """Print top-1 and top-5 of a run over every image of its validation set."""

    run: Positional[Path]
    """Run folder (its newest checkpoint is taken) or one of its checkpoints."""
    data_root: str | None = None
    """Path of the data, if it has moved since the run. None: the path that the run used."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device of the model; auto is CUDA if torch finds it."""
    precision: tuple[Literal["fp32", "tf32", "bf16", "fp16"], ...] = ()
    """Precisions to compute in; with several, validate in each and count the predictions that
    differ. Default: that of the run."""
    precise_bn_steps: MaybeCountOrZero = None
    """Measure BatchNorm's statistics on the training images of the last N steps before the
    checkpoint; 0: its running averages, which may lag behind the weights. Default: as the run
    validated."""


def evaluate(arguments: Sequence[str], prog: str = "bitfleet evaluate") -> None:
    """Parse `arguments` and evaluate.

    Raises:
        ValueError: bad input.
    """
    options: Evaluate = parse(Evaluate, arguments, prog)
    with job(options.device) as (ranks, device):
        from bitfleet.trainer.evaluate import evaluate_run

        found = evaluate_run(
            options.run,
            data_root=options.data_root,
            ranks=ranks,
            device=device,
            precisions=options.precision,
            precise_bn_steps=options.precise_bn_steps,
        )
        if is_main_rank():
            print(format_evaluation(found))


def format_evaluation(found: "Evaluation") -> str:
    """Return checkpoint and accuracy as text, with the precision if it is not the run's, and the
    differences if there are several."""
    lines = [str(found.checkpoint)]
    as_trained = list(found.accuracies) == [found.trained_in]
    if not as_trained:
        lines.append(f"trained in {found.trained_in}")
    for precision, accuracy in found.accuracies.items():
        lines.append(
            f"{'' if as_trained else f'{precision}  '}top-1 {accuracy.top1:.2%}  top-5 {accuracy.top5:.2%}  "
            f"loss {accuracy.loss:.4f}  {accuracy.num_images:,} images"
        )
    if len(found.accuracies) > 1:
        names = list(found.accuracies)
        among = f"between {names[0]} and {names[1]}" if len(names) == 2 else f"among {', '.join(names)}"
        lines.append(f"{found.num_different:,} of {accuracy.num_images:,} predictions differ {among}")
    return "\n".join(lines)


def main() -> None:
    """Entry point of the file."""
    run(lambda: evaluate(command_line(), "launch/evaluate.py"))


if __name__ == "__main__":
    main()
