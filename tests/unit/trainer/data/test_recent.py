from collections.abc import Iterator

import torch
from torch import Tensor

from bitfleet.trainer.data import remembering


class Loader:
    """Batches that say which they are: two micro-batches for each step."""

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        number = 2 * start_step
        while True:
            yield torch.full((1,), number), torch.zeros(1)
            number += 1


def remembered(step: int, num_steps: int, num_read: int) -> tuple[list[int], list[list[int]]]:
    """Return the micro-batches that were read after `step`, and those that are remembered."""
    stream = remembering(Loader(), step, num_steps, 2)  # type: ignore[arg-type]
    read = []
    for _ in range(num_read):
        images, _ = next(stream)
        read.append(int(images))
        images.zero_()  # what is remembered is a copy
    return read, [[int(images) for images in each] for each in stream.steps(2)]


def test_a_new_run_remembers_what_it_has_read() -> None:
    assert remembered(0, 3, 4) == ([0, 1, 2, 3], [[0, 1], [2, 3]])
    assert remembered(0, 2, 6) == ([0, 1, 2, 3, 4, 5], [[2, 3], [4, 5]])
    assert remembered(0, 2, 0) == ([], [])


def test_a_resumed_run_remembers_what_it_read_before() -> None:
    assert remembered(5, 3, 2) == ([10, 11], [[6, 7], [8, 9], [10, 11]])
    assert remembered(1, 3, 0) == ([], [[0, 1]])
