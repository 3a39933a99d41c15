"""Advice from a configuration, or from the folder of a run, to text."""

from pathlib import Path

from bitfleet.launch.advise.advice import advise
from bitfleet.launch.advise.gradient import Gradient, measure_gradient
from bitfleet.launch.advise.measured import (
    checkpoint_step,
    measured_flip_lines,
    measured_lines,
    read_flips,
    steps_to_compare,
)
from bitfleet.launch.advise.outlook import PREDICTED, count_images, make_outlook
from bitfleet.launch.advise.table import format_advice
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.run.folder import read_config

SCALED = (*PREDICTED, "latent_sgd", "sgdat")
"""Rules about which the size of the gradients says something."""


def advise_config(config: TrainConfig, num_images: int | None = None) -> str:
    """The table about a run that is to be made.

    Args:
        config: of the run.
        num_images: training images; None: counted, or those of the data set that has as many classes.

    Raises:
        ValueError: the number of images is not known, or less than a batch.
    """
    number, origin = _images(config, num_images)
    make_outlook(config, number)  # before the time for a backward pass is spent
    outlook = make_outlook(config, number, _gradient(config))
    return format_advice(outlook, origin, advise(outlook))


def advise_run(run: Path, num_images: int | None = None) -> str:
    """The table about a run that was made, or is being made: predicted, then measured.

    Raises:
        ValueError: no run, nothing logged yet; or as `advise_config`.
    """
    config = read_config(run)
    number, origin = _images(config, num_images)
    outlook = make_outlook(config, number)
    flips = read_flips(run, may_be_none=not RULES[config.optim.rule].flips)
    is_compared = outlook.predicts_flips and outlook.driven is None
    at = checkpoint_step(run) if is_compared else None
    steps = {*steps_to_compare(flips, outlook.num_steps), *([at] if at else [])}
    if max(steps, default=0) > outlook.num_steps:
        raise ValueError(
            f"{run} is at step {max(steps):,}, but {number:,} images make {outlook.num_steps:,} steps: pass --images, "
            f"the number of training images that it had"
        )
    outlook = make_outlook(config, number, _gradient(config), sorted(steps))
    measured = measured_lines(run, outlook, flips) if is_compared else measured_flip_lines(outlook, flips)
    return format_advice(outlook, origin, advise(outlook) + measured)


def _images(config: TrainConfig, num_images: int | None) -> tuple[int, str]:
    return (num_images, "as given") if num_images else count_images(config.data, config.model.num_classes)


def _gradient(config: TrainConfig) -> Gradient | None:
    """Only for the rules whose hyperparameters have its scale, or that are asked for it."""
    return measure_gradient(config) if config.optim.rule in SCALED else None
