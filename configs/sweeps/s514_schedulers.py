"""Schedules of gamma, sigma and threshold, one at a time.

section    5.1.4 of arXiv 2104.05124
question   which of them gains from a schedule, and of which form?
paper      BinaryNet on CIFAR-10, 350 epochs in batches of 50, from gamma 1e-7, sigma 1e-3,
           threshold 1e-6, Adam 1e-2: each one x0.1 every 100 epochs (sets *_testExp), or linear
           (*_testPoly, with unpublished ends). Here a stair is the same share of the run, 100/350,
           and the linear schedule ends where the stairs end, at 1e-3 of its start. as_coded, as in
           5.1.2.
runs       (1 + 3 x 2) points x 3 seeds = 21
command    bitfleet sweep s514_schedulers
           as in the paper: --config binarynet_cifar10 --epochs 350 --optim.lr.kind constant
"""

from collections.abc import Callable

from bitfleet.configs.sweeps.s512_ablation import CENTRE, RULE
from bitfleet.configs.sweeps.sweep import Point, Sweep, constants


def staircase(name: str, start: float, share: float = 100 / 350) -> tuple[str, ...]:
    """Return the overrides for x0.1 after each `share` of the run."""
    option = f"--optim.{name}"
    stairs = (f"{option}.kind", "exponential", f"{option}.rate", "0.1", f"{option}.share", f"{share:.6f}")
    return (*stairs, f"{option}.start", f"{start:g}")


def linear(name: str, start: float) -> tuple[str, ...]:
    """Return the overrides for a linear decay to 1e-3 of the start."""
    option = f"--optim.{name}"
    line = (f"{option}.kind", "polynomial", f"{option}.power", "1", f"{option}.end", f"{start * 1e-3:g}")
    return (*line, f"{option}.start", f"{start:g}")


FORMS: dict[str, Callable[[str, float], tuple[str, ...]]] = {
    "none": constants,
    "staircase": staircase,
    "linear": linear,
}


def scheduled(name: str | None, schedule: str) -> Point:
    """Return the point in which `name` follows `schedule` and the others are constant."""
    words = list(RULE)
    for hyperparameter, start in CENTRE.items():
        form = FORMS[schedule if hyperparameter == name else "none"]
        words += form(hyperparameter, start)
    return Point({"scheduled": name or "nothing", "schedule": schedule}, tuple(words))


def sweep() -> Sweep:
    """Return the sweep; the learning rate is that of the base."""
    return Sweep(
        name="s514_schedulers",
        title="5.1.4 Schedules",
        question="Does a staircase (x0.1, three times) or a linear decay of gamma, of sigma or of the threshold help?",
        base="fashion_small",
        axes={"scheduled": ("nothing", *CENTRE), "schedule": ("none", "staircase", "linear")},
        points=(
            scheduled(None, "none"),
            *(scheduled(name, schedule) for name in CENTRE for schedule in ("staircase", "linear")),
        ),
    )
