"""A run of the paper while it trains: what is said before it and after each validation."""

from bitfleet.launch.reproduce.curves import expected_curve
from bitfleet.launch.reproduce.papers import Paper
from bitfleet.launch.reproduce.recipe import changes_of_config
from bitfleet.launch.reproduce.standing import watcher
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.trainer import Trainer


def announcement(paper: Paper, recipe: TrainConfig, config: TrainConfig) -> str:
    """What is to be reproduced, what it is held against on the way, and which settings rule a reproduction out."""
    curve = expected_curve(paper.curves)
    if paper.is_dry:
        lines = [f"reproduce: dry run of {paper.title}, with a miniature network on the embedded images"]
    else:
        lines = [f"reproduce: {paper.title}, published {paper.top1} % top-1, tolerance {paper.tolerance} points"]
    held = (
        f"{curve.name} ({curve.epochs} epochs; {curve.recipe})" if curve else "nothing until its end: no curve is known"
    )
    lines.append(f"reproduce: validations are held against {held}")
    changes = changes_of_config(recipe, config)
    lines += [f"reproduce: CHANGED {change}" for change in changes]
    if changes and not paper.is_dry:
        lines.append('reproduce: with a changed recipe the verdict will be "not a reproduction"')
    return "\n".join(lines)


def watch(trainer: Trainer, paper: Paper) -> None:
    """Let rank 0's `trainer` say after each validation how the run stands."""
    trainer.after_validation = watcher(
        expected_curve(paper.curves),
        epochs=trainer.config.epochs,
        steps_per_epoch=trainer.loader.steps_per_epoch,
        num_classes=trainer.config.model.num_classes,
    )
