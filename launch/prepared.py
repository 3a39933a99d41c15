"""Build a trainer and announce its run: what `bitfleet train` and `bitfleet reproduce` share."""

from typing import TYPE_CHECKING

from bitfleet.launch.job import is_main_rank
from bitfleet.trainer.ranks.exit_codes import REQUEUE

if TYPE_CHECKING:
    import torch

    from bitfleet.trainer.config import TrainConfig
    from bitfleet.trainer.ranks.collectives import Ranks
    from bitfleet.trainer.trainer import Trainer


def prepared_trainer(config: "TrainConfig", ranks: "Ranks", device: "torch.device") -> "Trainer":
    """Return the trainer of the run, after rank 0 has said what the run will do and need.

    Raises:
        ValueError: bad input.
    """
    from bitfleet.launch.preflight.preflight import Preflight
    from bitfleet.launch.preflight.rehearsal import rehearse
    from bitfleet.trainer.engine.arithmetic import remark_on_precision
    from bitfleet.trainer.trainer import Trainer

    if config.preflight == "full":
        rehearse(config, ranks, device)
    trainer = Trainer(config, ranks, device)
    if is_main_rank():
        print(trainer.routing)
        print(f"data: {trainer.dataset.summary()}")
        if trainer.distillation:
            print(f"distillation: {trainer.distillation.summary()}")
        state = f"continues {trainer.resume_from.path}" if trainer.resume_from else "starts"
        if trainer.step >= trainer.num_steps:
            state = (
                f"is finished (to continue from its weights, pass another --run_dir and --init {trainer.folder.path})"
            )
        elif config.stop_after_steps and trainer.step >= config.stop_after_steps:
            state = f"is at step {trainer.step:,}, past --stop_after_steps {config.stop_after_steps:,}: nothing to do"
        print(
            f"run {trainer.folder.path} {state}: {trainer.num_steps:,} steps on {ranks.world_size} "
            f"rank{'s' * (ranks.world_size > 1)} ({device.type}, {trainer.config.engine.precision})"
        )
        if device.type == "cuda" and not config.engine.deterministic:
            print("engine.deterministic is off: repeating or continuing the run may give other bits")
        if remark := remark_on_precision(trainer.config.engine.precision, device.type):
            print(remark)
    cost = trainer.checkpoints.cost()
    if is_main_rank():
        preflight = Preflight(trainer)
        trainer.around_step = preflight.around_step
        print(cost, preflight.report(), sep="\n", end="\n\n", flush=True)
    return trainer


def say_stopped(trainer: "Trainer", again: str = "the same command with --resume auto continues") -> None:
    """Say on rank 0 that the run was asked to stop, if it was, and what continues it."""
    if is_main_rank() and trainer.stopped_by:
        print(
            f"\nbitfleet: stopped by {trainer.stopped_by} after step {trainer.step:,}; saved "
            f"{trainer.seconds_to_stop:.1f} s after it; exit code {REQUEUE}: {again}"
        )
