"""The pool that resizes on the CPU."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.request import Request
from bitfleet.trainer.data.resizing import Resizer
from bitfleet.trainer.data.sampler import Windows
from tests.unit.trainer.data.test_images import photo


def request_of(count: int) -> Request:
    """A request of `count` images, each mirrored; the list that they are of does not matter here."""
    images = ImageList(
        folder=None,  # type: ignore[arg-type]
        names=np.array([b"a"] * 9),
        labels=np.arange(9),
        heights=np.full(9, 50, np.int32),
        widths=np.full(9, 60, np.int32),
        sizes=np.ones(9, np.int64),
    )
    corners = np.zeros((count, 2), np.int32)
    return Request(images, np.arange(count), Windows(corners, corners), np.ones(count, np.int32), 0)


def windows(count: int) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(photo(40 + index, 50, index))) for index in range(count)]


@pytest.mark.parametrize("geometry", ["crop_resize", "resize_crop", "crop_bicubic"])
def test_batches_do_not_depend_on_the_number_of_threads(geometry: str) -> None:
    counts = [5, 1, 0, 8]
    one, three = (
        list(Resizer(geometry, 24, threads).resized((windows(n), request_of(n)) for n in counts))  # type: ignore[arg-type]
        for threads in (1, 3)
    )
    assert [sum(map(len, parts)) for parts, _ in one] == counts
    for (parts, request), (others, same), count in zip(one, three, counts, strict=True):
        assert len(request.samples) == len(same.samples) == count
        assert count == 0 or torch.equal(torch.cat(list(parts)), torch.cat(list(others)))


def test_an_error_comes_after_the_batches_before_it() -> None:
    def decoded() -> Iterator[tuple[list[torch.Tensor], Request]]:
        yield windows(2), request_of(2)
        yield windows(3), request_of(3)
        raise ValueError("broken")

    batches = Resizer("crop_resize", 24, 2).resized(decoded())
    assert [sum(map(len, next(batches)[0])) for _ in range(2)] == [2, 3]
    with pytest.raises(ValueError, match="broken"):
        next(batches)
