"""One batch to be read, and what may go wrong with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bitfleet.trainer.data.images import ImageList
from bitfleet.trainer.data.sampler import Ints, Windows

# crop_resize: decode the window only, resize it. resize_crop: resize the whole image, take a window of the result.
# crop: take the window, black where it leaves the image. crop_bicubic: as crop_resize, with the resize of official.py.
# whole: decode the image and do nothing with it.
Geometry = Literal["crop_resize", "resize_crop", "crop", "crop_bicubic", "whole"]
Batch = tuple[torch.Tensor, torch.Tensor]


class Request(NamedTuple):
    """One batch to be read: N images."""

    images: ImageList
    """The list that they are of."""
    samples: Ints
    """Positions in the list [N]."""
    windows: Windows
    """int32, or float32 for resize_crop."""
    flips: npt.NDArray[np.int32]
    """1 to mirror left to right [N]."""
    epoch: int
    """That windows and flips are of; 0 in validation."""
    asked: Ints | None = None
    """The samples that the stream asked for, where some were replaced [N]."""
    num_mends: int = 0
    """How often some were replaced."""
    ends_batch: bool = True
    """False for a part of a batch that others follow (parts.py)."""

    @property
    def labels(self) -> torch.Tensor:
        """int64 [N]."""
        return torch.from_numpy(self.images.labels[self.samples])

    def path(self, position: int) -> str:
        """The path of the image at `position` in the batch."""
        return self.images.path(int(self.samples[position]))

    def read(self, position: int) -> bytes:
        """The encoded image at `position`, or OSError."""
        return self.images.read(int(self.samples[position]))

    def part(self, positions: npt.NDArray[np.int64] | slice) -> "Request":
        """The images at `positions` in the batch."""
        windows = Windows(self.windows.starts[positions], self.windows.ends[positions])
        return self._replace(samples=self.samples[positions], windows=windows, flips=self.flips[positions])

    def without(self, positions: Sequence[int]) -> "Request":
        """All but the images at `positions` in the batch."""
        return self.part(np.setdiff1d(np.arange(len(self.samples)), positions))


Decoded = tuple[Sequence[torch.Tensor], Request]
"""Images of a batch, uint8 on the CPU, and the request that they are of: parts of the batch [n, image_size, image_size, 3], or an
image each [H, W, 3], finished or a window of any size. Parts are float32 where official.py has resized them."""
Mend = Callable[[Request, Mapping[int, str]], Request]
"""Gets a batch and, by position, why images of it cannot be read; returns another batch, or raises ValueError."""


class Pipeline(Protocol):
    """What turns requests into batches: dali.py, torch_pipeline.py, or memory_pipeline.py."""

    def batches(self, requests: Iterator[Request], mend: Mend) -> Iterator[Batch]:
        """Yield images, uint8 [N, image_size, image_size, 3], and labels, int64 [N], for each request, in order.

        Both are on the device where the model runs and belong to the caller. A new call ends the iteration of an earlier one.
        Images are float32, of the same scale 0..255, for the geometry crop_bicubic.

        Args:
            requests: read ahead of their consumer.
            mend: asked about a batch that has an image that cannot be read.

        Raises:
            ValueError: from `mend`, or the disk does not answer.
        """
        ...
