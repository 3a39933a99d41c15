"""Advice as text: one table."""

import textwrap
from collections import Counter
from collections.abc import Sequence

from bitfleet.launch.advise.outlook import Line, Outlook

WHY_WIDTH = 84


def format_advice(outlook: Outlook, images_from: str, lines: Sequence[Line]) -> str:
    """A head line, the table, and how many lines have each verdict."""
    config = outlook.config
    batch, epochs = config.global_batch_size, config.epochs
    head = (
        f"{config.name}: {config.optim.rule}, {outlook.num_steps:,} steps, {epochs} epoch{'s' * (epochs > 1)} of "
        f"{outlook.steps_per_epoch:,} batches of {batch:,}; {outlook.num_images:,} images ({images_from})"
    )
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [head, ""]
    for line in lines:
        first, *more = textwrap.wrap(line.why, WHY_WIDTH)
        cells = "  ".join(cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True))
        text += [f"{cells}  {first}", *(" " * (sum(widths) + 6) + rest for rest in more)]
    counts = Counter(line.verdict for line in lines)
    found = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("ok", "look", "wrong"))
    assumption = " Predictions are for gradients that are independent normal numbers: noise."
    return "\n".join([*text, "", f"{found}.{assumption if outlook.predicts_flips else ''}"])
