"""Tables of advice on a run: from its configuration before it, from its folder afterwards."""

import dataclasses
import textwrap
from collections import Counter
from pathlib import Path

from bitfleet.launch.advise.measured import measured_lines, read_flips, steps_to_compare
from bitfleet.launch.advise.outlook import Line, Outlook, count_images, measure_gradient
from bitfleet.launch.advise.rules import rule_lines
from bitfleet.launch.text import table
from bitfleet.optim import Schedule
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.checkpoint.format import latest_checkpoint, step_of
from bitfleet.trainer.config import TrainConfig, read_config

REASON_WIDTH = 84


def advise_config(config: TrainConfig, num_images: int | None = None) -> str:
    """Return the table about a run before it starts; `num_images` None: counted.

    Raises:
        ValueError: the number of images is unknown, or less than a batch.
    """
    outlook = _outlook(config, num_images)
    return as_table(outlook, advise(outlook))


def advise_run(run: Path, num_images: int | None = None) -> str:
    """Return the table about a run that has started: predictions, then measurements.

    Raises:
        ValueError: `run` is not a run, or has logged nothing yet; or as `advise_config`.
    """
    config, flips, checkpoint = read_config(run), read_flips(run), latest_checkpoint(run)
    if not flips and RULES[config.optim.rule].flips:
        raise ValueError(f"{run} logged no flip_ratio in metrics.jsonl: it had no step yet, or has no binary weights")
    outlook = _outlook(config, num_images)
    steps = [*steps_to_compare(flips, outlook.num_steps), *([step_of(checkpoint)] if checkpoint else [])]
    if max(steps, default=0) > outlook.num_steps:
        steps_of_images = f"{outlook.num_images:,} images make {outlook.num_steps:,} steps"
        raise ValueError(f"{run} is at step {max(steps):,}, but {steps_of_images}: pass --images, its training images")
    outlook = dataclasses.replace(outlook, more_steps=tuple(steps))
    return as_table(outlook, advise(outlook) + measured_lines(run, outlook, flips))


def _outlook(config: TrainConfig, num_images: int | None) -> Outlook:
    count, origin = (num_images, "given") if num_images else count_images(config.data, config.model.num_classes)
    outlook = Outlook(config=config, num_images=count, images_from=origin)
    return outlook if outlook.rule is None else dataclasses.replace(outlook, gradient=measure_gradient(config))


def advise(outlook: Outlook) -> list[Line]:
    """Return the lines about a run before it starts."""
    optim = outlook.config.optim
    schedules = [field.name for field in dataclasses.fields(optim) if isinstance(getattr(optim, field.name), Schedule)]
    lines = rule_lines(outlook) + [_schedule_line(outlook, name) for name in schedules]
    if outlook.driven is None:
        return lines
    target, start = optim.transitions.target.start, outlook.schedule(outlook.driven)(0)
    reason = (
        f"optim.transitions moves it so that flips follow a target, {target:.3g} at first; the rest is about its start"
    )
    lines = [line._replace(verdict="look") if line.verdict == "wrong" else line for line in lines]
    return [Line(f"{outlook.driven} is driven", f"from {start:.3g}", "look", reason), *lines]


def _schedule_line(outlook: Outlook, name: str) -> Line:
    """Say where a schedule ends, and whether the run gets there."""
    schedule, last, title = outlook.schedule(name), outlook.num_steps, f"schedule of {name}"
    length, end = schedule.delay_steps + (schedule.num_steps or last), f"its end, {schedule.end:g}"
    steps = (0, schedule.top_step, last - 1) if schedule.kind == "warmup_cosine" else (0, last - 1)
    value = " -> ".join(f"{schedule(step):.3g}" for step in steps)
    if name == outlook.driven:
        return Line(title, f"{schedule(0):.3g}", "ok", "driven from here")
    if schedule.kind == "constant":
        if schedule.end != 0.0:
            return Line(title, value, "look", f"constant: {end}, is used by other kinds only")
        if name == "latent_lr" and outlook.config.optim.alpha is None:  # which makes it a scale
            return Line(title, value, "look", "constant: weights near 0 flip until the end; let it fall")
        return Line(title, value, "ok", "constant")
    if schedule.kind == "exponential":
        stair = schedule.num_steps or last
        stairs = max(0, last - 1 - schedule.delay_steps) // stair
        reason = f"{stairs} stairs of {stair:,} steps x {schedule.rate:g} within the run"
        return Line(title, value, "ok" if stairs else "look", reason)
    if length < 0.9 * last:
        reason = f"at {end}, from step {length:,} of {last:,} on: should the run be longer than its schedule?"
        return Line(title, value, "look", reason)
    if length > 1.1 * last:
        return Line(title, value, "look", f"it would reach {end}, after {length:,} steps, but the run has {last:,}")
    left = length - last + 1
    if left <= 0 or schedule(last - 1) == schedule.end:
        return Line(title, value, "ok", f"it reaches {end}")
    return Line(title, value, "ok", f"the last step is {left:,} before {end}")


def as_table(outlook: Outlook, lines: list[Line]) -> str:
    """Return a head line, the table, and the number of lines with each verdict."""
    config, epochs = outlook.config, outlook.config.epochs
    head = (
        f"{config.name}: {config.optim.rule}, {outlook.num_steps:,} steps, {epochs} epoch{'s' * (epochs > 1)} of "
        f"{outlook.steps_per_epoch:,} batches of {config.global_batch_size:,}; {outlook.num_images:,} images "
        f"({outlook.images_from})"
    )
    rows = []
    for line in lines:
        first, *more = textwrap.wrap(line.reason, REASON_WIDTH)
        rows += [(*line[:3], first), *(("", "", "", rest) for rest in more)]
    counts = Counter(line.verdict for line in lines)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("ok", "look", "wrong")) + "."
    if outlook.rule is not None:
        summary += " Predictions are for gradients that are independent normal numbers: noise."
    return f"{head}\n\n{table(rows, '<<<<')}\n\n{summary}"
