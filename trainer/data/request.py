"""Describe a batch to be read, cut it into parts of bounded memory, and join those."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bitfleet.trainer.data.image_list import ImageList
from bitfleet.trainer.data.sampler import Ints, Windows

Geometry = Literal["crop_resize", "resize_crop", "crop", "crop_bicubic", "whole"]
"""Way in which an image becomes the output.

crop_resize: decode the window only, resize it. resize_crop: resize the whole image, take a window
of the result. crop: take the window, black where it leaves the image. crop_bicubic: as crop_resize,
with the resize of preprocessing.py. whole: decode the image and nothing else.
"""
Batch = tuple[torch.Tensor, torch.Tensor]
"""Images and labels."""
MOST_BYTES = 1 << 28
"""Most bytes of pixels that are decoded together; a single image may have more."""


class Request(NamedTuple):
    """One batch of N images to be read."""

    images: ImageList
    """List that the samples belong to."""
    samples: Ints
    """Positions in the list [N]."""
    windows: Windows
    """int32, or float32 for resize_crop."""
    flips: npt.NDArray[np.int32]
    """1 to mirror left to right [N]."""
    epoch: int
    """Epoch of windows and flips; 0 in validation."""
    original_samples: Ints | None = None
    """Samples before any were replaced [N]; None if none was."""
    num_attempts: int = 0
    """Number of times that unreadable samples were replaced."""
    ends_batch: bool = True
    """False for a part of a batch that other parts follow."""

    @property
    def labels(self) -> torch.Tensor:
        """Labels, int64 [N]."""
        return torch.from_numpy(self.images.labels[self.samples])

    def path(self, position: int) -> str:
        """Return the path of the image at `position` in the batch."""
        return self.images.path(int(self.samples[position]))

    def read(self, position: int) -> bytes:
        """Return the encoded image at `position`; may raise OSError."""
        return self.images.read(int(self.samples[position]))

    def part(self, positions: npt.NDArray[np.int64] | slice) -> "Request":
        """Return the request for the images at `positions` in the batch."""
        windows = Windows(self.windows.starts[positions], self.windows.ends[positions])
        return self._replace(samples=self.samples[positions], windows=windows, flips=self.flips[positions])

    def without(self, positions: Sequence[int]) -> "Request":
        """Return the request without the images at `positions` in the batch."""
        return self.part(np.setdiff1d(np.arange(len(self.samples)), positions))


Decoded = tuple[Sequence[torch.Tensor], Request]
"""Images of a batch on the CPU, and their request.

Either parts of the batch [n, image_size, image_size, 3] or single images [H, W, 3], finished or
windows of any size. uint8, or float32 once preprocessing.py has resized them.
"""
Recover = Callable[[Request, Mapping[int, str]], Request]
"""Takes a batch and position -> reason of unreadable images; returns another or raises."""


class Pipeline(Protocol):
    """Turns requests into batches: dali.py, torch_pipeline.py or memory_pipeline.py."""

    def batches(self, requests: Iterator[Request], recover: Recover) -> Iterator[Batch]:
        """Yield images [N, image_size, image_size, 3] and labels, int64 [N], per request.

        Images are uint8, or float32 on the same scale 0..255 for crop_bicubic. Both are on the
        device of the model and belong to the caller. A new call ends the iteration of an earlier
        one.

        Args:
            requests: Read ahead of their consumer.
            recover: Called for a batch with unreadable images.

        Raises:
            ValueError: From `recover`, or the disk does not answer.
        """
        ...


def in_parts(requests: Iterable[Request]) -> Iterator[Request]:
    """Yield each request, cut into several if its whole images have more than MOST_BYTES."""
    for request in requests:
        images, samples = request.images, request.samples
        parts = slices_of(3 * images.heights[samples].astype(np.int64) * images.widths[samples])
        for part in parts[:-1]:
            yield request.part(part)._replace(ends_batch=False)
        yield request.part(parts[-1]) if len(parts) > 1 else request


def slices_of(sizes: Ints, most_items: int | None = None) -> list[slice]:
    """Cut a sequence into at least one run of at most MOST_BYTES and `most_items`.

    Args:
        sizes: Bytes of each item [N].
        most_items: None for any number.
    """
    if int(sizes.sum()) <= MOST_BYTES and most_items is None:
        return [slice(0, len(sizes))]
    starts, total = [0], 0
    for index, size in enumerate(sizes.tolist()):
        total += size
        if index > starts[-1] and (total > MOST_BYTES or index - starts[-1] == most_items):
            starts.append(index)
            total = size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def joined_parts(decoded: Iterable[Decoded]) -> Iterator[Decoded]:
    """Yield whole batches from the decoded parts that `in_parts` cut them into."""
    parts: list[Decoded] = []
    for part in decoded:
        parts.append(part)
        if part[1].ends_batch:
            yield _joined(parts) if len(parts) > 1 else part
            parts = []
    assert not parts, "a batch has no last part"


def _joined(parts: list[Decoded]) -> Decoded:
    images: list[torch.Tensor] = [image for part, _ in parts for image in part]
    requests = [request for _, request in parts]
    starts, ends = (np.concatenate([request.windows[corner] for request in requests]) for corner in (0, 1))
    samples = np.concatenate([request.samples for request in requests])
    flips = np.concatenate([request.flips for request in requests])
    return images, Request(requests[0].images, samples, Windows(starts, ends), flips, requests[0].epoch)
