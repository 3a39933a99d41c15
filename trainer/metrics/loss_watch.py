"""A training loss that grows by orders of magnitude, which a run outlives and its accuracy does not."""

import math
from collections.abc import Iterable

FACTOR = 100.0
"""Two orders of magnitude."""
SMALLEST_PART = 0.1
"""Of the loss of guessing: a loss that is smaller still does not lower what others are compared with, or noise would count."""


class LossWatch:
    """Compares each reported loss with the smallest one before it, and with the loss of guessing.

    Args:
        num_classes: whose guessing has the loss log(num_classes): what a network begins with, or soon reaches.
        earlier: losses that the run has reported before, as when it is continued; None for a report without images.
    """

    def __init__(self, num_classes: int, earlier: Iterable[float | None] = ()) -> None:
        guessing = math.log(max(num_classes, 2))
        self._floor, self._smallest, self._said = SMALLEST_PART * guessing, guessing, 0.0
        for loss in earlier:
            if loss is not None:
                self.sentence(0, loss)

    def sentence(self, step: int, loss: float) -> str:
        """Return what is to be said of the loss up to `step`: once for every two orders of magnitude, else ""."""
        self._smallest = min(self._smallest, max(loss, self._floor))
        if not loss >= FACTOR * max(self._smallest, self._said):
            return ""
        self._said = loss
        return (
            f"the training loss grew to {loss:.3g} at step {step:,}, {loss / self._smallest:,.0f} times the smallest before it "
            f"({self._smallest:.3g}): the run diverges, a lower learning rate or threshold schedule is needed"
        )
