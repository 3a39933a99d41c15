"""Expected validation curves, and where a run stands against them.

The curves are in expected/*.json, one file per run:

    {"curves": [{"name": "larq-zoo BiRealNet", "recipe": "...", "comparable": "...",
                 "source": "...", "epochs": 300, "points": [[1, 8.85, 10.0], ...]}]}

A point is: epochs done, top-1 in percent, tolerance in points. Runs are compared with the first
curve of a file, so one of bitfleet's runs, put in front, replaces a neighbour's. The card of a run
has its curve in this form, without the tolerances, which one run cannot know.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.metrics import Accuracy

FOLDER = Path(__file__).parent / "expected"


class Point(NamedTuple):
    """Top-1 in percent after some epochs, and its tolerance in points."""

    epochs_done: float
    top1: float
    tolerance: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Validation top-1 of a run that others are compared with."""

    name: str
    recipe: str
    """Description of the training."""
    comparable: str
    """Limits of a comparison with it, and the origin of the tolerances."""
    source: str
    epochs: int
    """Length of the run."""
    points: tuple[Point, ...]
    """Points by epochs, the last one at the end."""

    def __post_init__(self) -> None:
        done = [point.epochs_done for point in self.points]
        are_points = all(0.0 <= point.top1 <= 100.0 and point.tolerance > 0.0 for point in self.points)
        if not are_points or not done or done != sorted(set(done)) or done[0] <= 0 or done[-1] != self.epochs:
            raise ValueError(
                f"the curve {self.name!r} has the points {[tuple(point) for point in self.points]}: expected rising "
                f"epochs above 0 that end with its length, {self.epochs}, top-1 in percent, and tolerances above 0"
            )


def expected_curve(name: str, folder: Path = FOLDER) -> Curve | None:
    """Return the first curve of the file `name`, with which runs are compared; None: none is known.

    Raises:
        ValueError: a curve does not have the format above.
    """
    path = folder / f"{name}.json"
    try:
        curves = [
            Curve(**{**curve, "points": tuple(Point(*map(float, point)) for point in curve["points"])})
            for curve in json.loads(path.read_text())["curves"]
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of curves (launch/reproduce/curves.py): {error}") from error
    return curves[0] if curves else None


def expected_at(curve: Curve, fraction: float) -> Point | None:
    """Return the point of `curve` after `fraction` of its length; None before its first point.

    Linear in the logarithm of the epochs between its points: accuracy rises fast only at first.
    """
    done, points = fraction * curve.epochs, curve.points
    if done < points[0].epochs_done * (1 - 1e-9):
        return None
    for before, after in itertools.pairwise(points):
        if done < after.epochs_done:
            part = max(math.log(done / before.epochs_done) / math.log(after.epochs_done / before.epochs_done), 0.0)
            top1 = before.top1 + part * (after.top1 - before.top1)
            return Point(done, top1, before.tolerance + part * (after.tolerance - before.tolerance))
    return Point(done, points[-1].top1, points[-1].tolerance)


class Standing(NamedTuple):
    """A validation next to what was expected, in percent."""

    epochs_done: float
    top1: float
    difference: float | None  # points above (+) or below (-) the expected
    expected: float | None
    tolerance: float | None
    word: str  # on track, off, too early or no curve


def stand(curve: Curve | None, epochs_done: float, config: TrainConfig, top1: float) -> Standing:
    """Compare top-1 in percent with `curve` at the same fraction of the run of `config`.

    If the tolerance reaches down to guessing, no run could be off, and it is too early to tell.
    """
    point = None if curve is None else expected_at(curve, epochs_done / config.epochs)
    if point is None:
        return Standing(epochs_done, top1, None, None, None, "no curve" if curve is None else "too early")
    difference, lowest = top1 - point.top1, point.top1 - point.tolerance
    word = (
        "off"
        if abs(difference) > point.tolerance
        else "too early"
        if lowest <= 100 / config.model.num_classes
        else "on track"
    )
    return Standing(epochs_done, top1, difference, point.top1, point.tolerance, word)


def watcher(curve: Curve | None, config: TrainConfig, steps_per_epoch: int) -> Callable[[int, Accuracy], str]:
    """Return a callback for `Trainer.after_validation` that says where the run stands."""

    def compare(step: int, accuracy: Accuracy) -> str:
        standing = stand(curve, step / steps_per_epoch, config, 100 * accuracy.top1)
        at = f"at epoch {standing.epochs_done:g}/{config.epochs}"
        if curve is None:
            return f"reproduce: top-1 {standing.top1:.2f} % {at}; no curve is known to compare it with"
        if standing.difference is None:
            return f"reproduce: too early to tell {at}: before the first point of {curve.name}"
        part = f"{100 * standing.epochs_done / config.epochs:.3g} % of its run"
        words = {"off": f"off by {standing.difference:+.1f} points", "too early": "too early to tell"}
        return (
            f"reproduce: {words.get(standing.word, standing.word)} {at}: top-1 {standing.top1:.2f} %, expected "
            f"{standing.expected:.2f} +- {standing.tolerance:.1f} ({curve.name} at {part})"
        )

    return compare
