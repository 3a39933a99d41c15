"""Resizing on the CPU: threads make a batch of decoded windows while the next one is decoded.

torch's uint8 kernel, which follows Pillow's, takes a quarter of the time of DALI's resize on a CPU (docs/data.md); on a GPU DALI
resizes itself.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bitfleet.trainer.data import official
from bitfleet.trainer.data.central_view import central_view, is_long, resized_size
from bitfleet.trainer.data.request import Decoded, Geometry, Request

_BATCHES_BEHIND = 1


class Resizer:
    """Threads that turn decoded windows into batches."""

    def __init__(self, geometry: Geometry, image_size: int, num_threads: int) -> None:
        """Nothing is started yet.

        Args:
            geometry: crop_resize, resize_crop or crop_bicubic.
            image_size: Pixels, height and width of the output.
            num_threads: Threads of the pool.
        """
        self._geometry = geometry
        self._image_size = image_size
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="resize")

    def resized(self, decoded: Iterable[Decoded]) -> Iterator[Decoded]:
        """Yield the batch of each of `decoded`, whose images are windows, in order and in parts.

        An error of `decoded` comes after the batches before it.
        """
        behind: deque[tuple[list[Future[Tensor]], Request]] = deque()
        failure: Exception | None = None
        try:
            for windows, request in decoded:
                behind.append((self._submit(windows, request), request))
                if len(behind) > _BATCHES_BEHIND:
                    yield _finished(*behind.popleft())
        except Exception as error:
            failure = error
        while behind:
            yield _finished(*behind.popleft())
        if failure is not None:
            raise failure

    def _submit(self, windows: Sequence[Tensor], request: Request) -> list[Future[Tensor]]:
        shares = np.array_split(np.arange(len(windows)), min(len(windows), self._num_threads) or 1)
        return [
            self._threads.submit(self._resize, [windows[i] for i in share.tolist()], request.flips[share])
            for share in shares
            if len(share)
        ]

    def _resize(self, windows: list[Tensor], flips: np.ndarray) -> Tensor:
        size = self._image_size
        if self._geometry == "crop_bicubic":
            return official.resize_windows(windows, flips, size)
        images = np.empty((len(windows), size, size, 3), np.uint8)
        for image, window, flip in zip(images, windows, flips.tolist(), strict=True):
            resized = _central(window, size) if self._geometry == "resize_crop" else _resized(window, size, size)
            image[:] = (resized.flip(3) if flip else resized)[0].permute(1, 2, 0).numpy()
        return torch.from_numpy(images)


def _finished(parts: list[Future[Tensor]], request: Request) -> Decoded:
    return [part.result() for part in parts], request


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """`image`, uint8 [H, W, 3], as uint8 [1, 3, height, width] in channels_last."""
    # channels_last to torch: without that the kernel first makes it planar.
    batch = image.contiguous()[None].permute(0, 3, 1, 2)
    return interpolate(batch, size=(height, width), mode="bilinear", antialias=True)


def _central(image: Tensor, size: int) -> Tensor:
    """torchvision's Resize(size * 256 // 224) and CenterCrop(size), uint8 [1, 3, size, size]."""
    height, width = resized_size(image.shape[0], image.shape[1], size)
    if is_long(image.shape[0], image.shape[1], size):
        return torch.from_numpy(central_view(image.numpy(), size).copy()).permute(2, 0, 1)[None]
    top, left = (round((side - size) / 2) for side in (height, width))  # half to even, as torchvision
    return _resized(image, height, width)[:, :, top : top + size, left : left + size]
