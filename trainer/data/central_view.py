"""torchvision's Resize and CenterCrop of an image that is much longer than wide: only what is seen is resized."""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

_MOST_WINDOWS = 32


def resized_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width after torchvision's Resize(size * 256 // 224)."""
    short = min(height, width)
    return size * 256 // 224 * height // short, size * 256 // 224 * width // short


def is_long(height: int, width: int, size: int) -> bool:
    """Say whether the whole image, resized, has more than 32 times the pixels of its central window.

    It is then 24 times as long as wide. A window of 224 pixels of a 1 x 20000 image would need 4 GB for the rest.
    """
    resized_height, resized_width = resized_size(height, width, size)
    return resized_height * resized_width > _MOST_WINDOWS * size * size


def central_view(pixels: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return the central window, uint8 [size, size, 3], of an image after a bilinear resize with antialiasing.

    A value may differ by 1 or 2 from that of the whole resize, whose weights are rounded elsewhere.

    Args:
        pixels: uint8 [H, W, 3].
        size: Pixels, height and width of the window.
    """
    height, width, _ = pixels.shape
    resized_height, resized_width = resized_size(height, width, size)
    rows, top, bottom = _seen(height, resized_height, size)
    columns, left, right = _seen(width, resized_width, size)
    seen = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    return np.asarray(seen.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def _seen(side: int, resized: int, size: int) -> tuple[slice, float, float]:
    """The pixels of a side that the window is made of, and where among them it starts and ends."""
    scale, start = side / resized, round((resized - size) / 2)  # half to even, as torchvision
    first, last = start * scale, (start + size) * scale
    support = max(scale, 1.0) + 1
    low, high = max(0, math.floor(first - support)), min(side, math.ceil(last + support))
    return slice(low, high), first - low, min(last - low, high - low)
