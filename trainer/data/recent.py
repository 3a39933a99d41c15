"""A stream of batches that remembers the images of its last ones."""

from collections import deque
from collections.abc import Iterator

from torch import Tensor

from bitfleet.trainer.data.loaders import TrainLoader
from bitfleet.trainer.data.request import Batch


class RecentImages:
    """Yields the batches of `stream`, and keeps copies of the images of the last ones.

    Args:
        stream: of the micro-batches of a rank.
        num_kept: number of micro-batches, whose images stay on the device.
    """

    def __init__(self, stream: Iterator[Batch], num_kept: int) -> None:
        self._stream = stream
        self._kept: deque[Tensor] = deque(maxlen=num_kept)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._stream)
        self._kept.append(batch[0].clone())
        return batch

    def steps(self, num_micro_batches: int) -> list[list[Tensor]]:
        """Return the images kept, by optimizer steps of `num_micro_batches`, the oldest first."""
        images = list(self._kept)
        return [images[start : start + num_micro_batches] for start in range(0, len(images), num_micro_batches)]


def remembering(loader: TrainLoader, step: int, num_steps: int, num_micro_batches: int) -> RecentImages:
    """Return the stream of `loader` from `step` on, which has the images of the `num_steps` steps
    before it and keeps those of as many.

    Args:
        loader: of the run.
        step: optimizer steps done.
        num_steps: to remember.
        num_micro_batches: per step on this rank.
    """
    first = max(0, step - num_steps)
    stream = RecentImages(loader.batches(first), num_steps * num_micro_batches)
    for _ in range((step - first) * num_micro_batches):
        next(stream)
    return stream
