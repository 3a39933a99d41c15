"""Resize and normalize images; threads resize a batch while the next one is decoded.

torch's uint8 kernel, which follows Pillow's, takes a quarter of the time of DALI's resize on a CPU;
on a GPU DALI resizes.
"""

import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bitfleet.trainer.data import preprocessing
from bitfleet.trainer.data.request import Decoded, Geometry, Request

_BATCHES_BEHIND = 1
_MOST_WINDOWS = 32


def normalize(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Return (images - mean) / std, on the device of the images.

    Args:
        images: uint8 or float32 [N, H, W, 3], on the scale 0..255; not modified.
        mean: Of R, G, B on the scale 0..255.
        std: Of R, G, B on the scale 0..255.

    Returns:
        float32 [N, 3, H, W] in channels_last, the layout of the NHWC input: one pass to convert, no
        transposition.
    """
    mean_row, std_row = _channel_rows(mean, std, images.shape[2], images.device)
    num_images, height, width, _ = images.shape
    rows = images.view(num_images, height, width * 3)
    centred = rows - mean_row if images.is_floating_point() else rows.to(torch.float32).sub_(mean_row)
    return centred.div_(std_row).view(num_images, height, width, 3).permute(0, 3, 1, 2)


@functools.cache
def _channel_rows(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    # A whole row, because an inner loop over three channels is four times slower on the CPU.
    # Cached, because making one on a GPU waits for a copy. Outside inference mode, since training
    # uses it too.
    with torch.inference_mode(False):
        return torch.tensor(mean * width, device=device), torch.tensor(std * width, device=device)


class Resizer:
    """Threads that turn decoded windows into batches."""

    def __init__(self, geometry: Geometry, image_size: int, num_threads: int) -> None:
        """Create the pool; no thread starts yet.

        Args:
            geometry: crop_resize, resize_crop or crop_bicubic.
            image_size: Height and width of the output, pixels.
            num_threads: Threads of the pool.
        """
        self._geometry = geometry
        self._image_size = image_size
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="resize")

    def resized(self, decoded: Iterable[Decoded]) -> Iterator[Decoded]:
        """Yield each batch of decoded windows resized, in order, as a sequence of parts.

        An error of `decoded` is raised after the batches before it.
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

    def _resize(self, windows: list[Tensor], flips: npt.NDArray[np.int32]) -> Tensor:
        size = self._image_size
        if self._geometry == "crop_bicubic":
            return preprocessing.resize_windows(windows, flips, size)
        images = np.empty((len(windows), size, size, 3), np.uint8)
        for image, window, flip in zip(images, windows, flips.tolist(), strict=True):
            resized = _central(window, size) if self._geometry == "resize_crop" else _resized(window, size, size)
            image[:] = (resized.flip(3) if flip else resized)[0].permute(1, 2, 0).numpy()
        return torch.from_numpy(images)


def _finished(parts: list[Future[Tensor]], request: Request) -> Decoded:
    return [part.result() for part in parts], request


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [H, W, 3] to uint8 [1, 3, height, width] in channels_last."""
    # channels_last to torch: without that the kernel first makes it planar.
    batch = image.contiguous()[None].permute(0, 3, 1, 2)
    return interpolate(batch, size=(height, width), mode="bilinear", antialias=True)


def _central(image: Tensor, size: int) -> Tensor:
    """Apply torchvision's Resize(size * 256 // 224) and CenterCrop(size), uint8 [1, 3, H, W]."""
    height, width = resized_size(image.shape[0], image.shape[1], size)
    if is_long(image.shape[0], image.shape[1], size):
        return torch.from_numpy(central_view(image.numpy(), size).copy()).permute(2, 0, 1)[None]
    top, left = (round((side - size) / 2) for side in (height, width))  # half to even, as torchvision
    return _resized(image, height, width)[:, :, top : top + size, left : left + size]


def resized_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width after torchvision's Resize(size * 256 // 224)."""
    short = min(height, width)
    return size * 256 // 224 * height // short, size * 256 // 224 * width // short


def is_long(height: int, width: int, size: int) -> bool:
    """Return True if the whole resized image has over 32 times the pixels of its window.

    It is then 24 times as long as wide. For a window of 224 pixels, resizing a 1 x 20000 image
    whole would need 4 GB.
    """
    resized_height, resized_width = resized_size(height, width, size)
    return resized_height * resized_width > _MOST_WINDOWS * size * size


def central_view(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return torchvision's Resize and CenterCrop of a long image; only the visible part is resized.

    Bilinear with antialiasing. A value may differ by 1 or 2 from that of the whole resize, whose
    weights are rounded elsewhere.

    Args:
        pixels: uint8 [H, W, 3].
        size: Height and width of the window, pixels.

    Returns:
        uint8 [size, size, 3].
    """
    height, width, _ = pixels.shape
    resized_height, resized_width = resized_size(height, width, size)
    rows, top, bottom = _visible(height, resized_height, size)
    columns, left, right = _visible(width, resized_width, size)
    visible = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    return np.asarray(visible.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def _visible(side: int, resized: int, size: int) -> tuple[slice, float, float]:
    """Return the input pixels of a window, and where among them it starts and ends."""
    scale, start = side / resized, round((resized - size) / 2)  # half to even, as torchvision
    first, last = start * scale, (start + size) * scale
    support = max(scale, 1.0) + 1
    low, high = max(0, math.floor(first - support)), min(side, math.ceil(last + support))
    return slice(low, high), first - low, min(last - low, high - low)
