"""Where a run stands against the expected curve, after a validation."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from bitfleet.launch.reproduce.curves import Curve, Point, expected_at
from bitfleet.trainer.metrics import Accuracy

Word = Literal["on track", "off", "too early", "no curve"]


class Standing(NamedTuple):
    """A validation beside what was expected of it; accuracies in percent."""

    epochs_done: float
    top1: float
    expected: float | None
    tolerance: float | None
    word: Word

    @property
    def difference(self) -> float | None:
        """Points above (+) or below (-) the expected."""
        return None if self.expected is None else self.top1 - self.expected


def stand(curve: Curve | None, epochs_done: float, epochs: int, top1: float, chance: float) -> Standing:
    """Compare a validation with the point of `curve` at the same fraction of the run.

    Args:
        curve: None: there is none.
        epochs_done: of this run.
        epochs: its length.
        top1: in percent.
        chance: top-1 of guessing, in percent. Where the tolerance reaches down to it, no run could be off: that is said.
    """
    point: Point | None = None if curve is None else expected_at(curve, epochs_done / epochs)
    if point is None:
        return Standing(epochs_done, top1, None, None, "no curve" if curve is None else "too early")
    is_off = abs(top1 - point.top1) > point.tolerance
    word: Word = "off" if is_off else "too early" if point.top1 - point.tolerance <= chance else "on track"
    return Standing(epochs_done, top1, point.top1, point.tolerance, word)


def sentence(standing: Standing, curve: Curve | None, epochs: int) -> str:
    """The standing in words."""
    at = f"epoch {standing.epochs_done:g}/{epochs}"
    if curve is None:
        return f"reproduce: top-1 {standing.top1:.2f} % at {at}; no curve is known that it could be held against"
    if standing.expected is None or standing.tolerance is None:
        return f"reproduce: too early to tell at {at}: before the first point of {curve.name}"
    measure = (
        f"top-1 {standing.top1:.2f} %, expected {standing.expected:.2f} +- {standing.tolerance:.1f} "
        f"({curve.name} at {100 * standing.epochs_done / epochs:.3g} % of its run)"
    )
    if standing.word == "off":
        return f"reproduce: off by {standing.top1 - standing.expected:+.1f} points at {at}: {measure}"
    return f"reproduce: {'on track' if standing.word == 'on track' else 'too early to tell'} at {at}: {measure}"


def watcher(
    curve: Curve | None, *, epochs: int, steps_per_epoch: int, num_classes: int
) -> Callable[[int, Accuracy], str]:
    """What to say after a validation: a function of the steps done and its accuracy, for `Trainer.after_validation`."""

    def say(step: int, accuracy: Accuracy) -> str:
        standing = stand(curve, step / steps_per_epoch, epochs, 100 * accuracy.top1, 100 / num_classes)
        return sentence(standing, curve, epochs)

    return say
