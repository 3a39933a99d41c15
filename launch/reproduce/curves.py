"""Expected validation curves: expected/*.json, one file for each run of the paper.

    {"curves": [{"name": "larq-zoo BiRealNet", "recipe": "...", "comparable": "...", "source": "...",
                 "epochs": 300, "points": [[1, 8.85, 10.0], ...]}]}

A point is: epochs done, top-1 in percent, tolerance in points. The first curve of a file is the one that runs are held against,
so one of bitfleet's own runs, put in front, takes the place of a neighbour's. The card of a run (reproduce.json) has its curve
in this form, but for the tolerances, which one run cannot know.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "expected"


class Point(NamedTuple):
    """Top-1 after some epochs."""

    epochs_done: float
    top1: float
    """Percent."""
    tolerance: float
    """Points."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Validation top-1 of a run that is a measure for others."""

    name: str
    recipe: str
    """How that run was trained."""
    comparable: str
    """How far others can be held against it, and where the tolerances come from."""
    source: str
    epochs: int
    """Its length."""
    points: tuple[Point, ...]
    """By epochs, the last one at the end."""

    def __post_init__(self) -> None:
        done = [point.epochs_done for point in self.points]
        if not done or done != sorted(set(done)) or done[0] <= 0 or done[-1] != self.epochs:
            raise ValueError(
                f"the points of the curve {self.name!r} are after {done} epochs: expected rising numbers above 0 that end with "
                f"its length, {self.epochs}"
            )
        for point in self.points:
            if not (0.0 <= point.top1 <= 100.0 and point.tolerance > 0.0):
                raise ValueError(
                    f"the curve {self.name!r} has the point {tuple(point)}: expected epochs, top-1 in percent and a "
                    "tolerance above 0"
                )


def read_curves(name: str, folder: Path = FOLDER) -> tuple[Curve, ...]:
    """The curves of the file `name`, the one that counts first.

    Raises:
        ValueError: a curve is not as the format wants it.
    """
    path = folder / f"{name}.json"
    try:
        return tuple(
            Curve(**{**curve, "points": tuple(Point(*map(float, point)) for point in curve["points"])})
            for curve in json.loads(path.read_text())["curves"]
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a file of curves, as launch/reproduce/curves.py describes them: {error}"
        ) from error


def expected_curve(name: str) -> Curve | None:
    """The curve of the file `name` that runs are held against; None: none is known."""
    return next(iter(read_curves(name)), None)


def expected_at(curve: Curve, fraction: float) -> Point | None:
    """The point of `curve` after `fraction` of its length, linear in the logarithm of the epochs between its points.

    Accuracy rises fast at first and slowly later, which a straight line over the epochs would not follow. None before its first
    point.
    """
    done = fraction * curve.epochs
    points = curve.points
    if done < points[0].epochs_done * (1 - 1e-9):
        return None
    for before, after in itertools.pairwise(points):
        if done < after.epochs_done:
            part = max(math.log(done / before.epochs_done) / math.log(after.epochs_done / before.epochs_done), 0.0)
            top1 = before.top1 + part * (after.top1 - before.top1)
            return Point(done, top1, before.tolerance + part * (after.tolerance - before.tolerance))
    return Point(done, points[-1].top1, points[-1].tolerance)
