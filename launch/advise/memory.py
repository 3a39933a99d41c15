"""How far back the moving averages of a rule reach, against the length of the run."""

import math

import numpy as np
import numpy.typing as npt

from bitfleet.launch.advise.outlook import Line, Outlook
from bitfleet.launch.advise.theory import outlived_step
from bitfleet.optim import Schedule

MAX_VALUES = 20_000
"""Of a schedule; a longer run is looked at in strides."""


def values_of(schedule: Schedule, num_steps: int) -> tuple[npt.NDArray[np.float64], int]:
    """The values of the first `num_steps` steps, fp64, and the stride in steps between them."""
    stride = max(1, num_steps // MAX_VALUES)
    return np.array([schedule(step) for step in range(0, num_steps, stride)]), stride


def reach(start: float, end: float) -> str:
    """1/rate at the first and the last step, in steps."""
    first, last = (_steps(rate) for rate in (start, end))
    return f"{first} steps" if first == last else f"{first} -> {last} steps"


def _steps(rate: float) -> str:
    if rate <= 1e-300:
        return "endless"
    return f"{1 / rate:,.0f}" if 1 / rate < 1e8 else f"{1 / rate:.0e}"


def memory_line(name: str, rate: Schedule, outlook: Outlook, never: str) -> Line:
    """The memory of an average whose rate is called `name`.

    Args:
        name: of the rate.
        rate: its length is filled in.
        outlook: the run.
        never: what it means if the memory is longer than the whole run.
    """
    last = outlook.num_steps
    start, title, value = rate(0), f"memory 1/{name}", reach(rate(0), rate(last - 1))
    epochs = f"{1 / start / outlook.steps_per_epoch if start > 0.0 else math.inf:,.2g} epochs at the start"
    outlived = outlived_step(rate, last)
    if outlived is None:
        return Line(title, value, "ok", f"{epochs}; to the end shorter than what is left of the run")
    if outlived <= 1:
        return Line(title, value, "look", f"{epochs}, longer than the whole run: {never}")
    share = outlived / last
    why = f"{epochs}; from step {outlived:,} ({share:.0%} of the run) longer than what is left: from there the weights set"
    return Line(title, value, "ok" if share > 0.3 else "look", why)
