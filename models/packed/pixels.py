"""Crop and resize an image as the evaluation of a run does, with numpy and Pillow."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from bitfleet.packed.program import Array

TABLE_SIZE = 1024
"""TensorFlow looks up bicubic weights for a position rounded to 1/1024 pixel."""


def pixels_of(image: Image.Image, preprocessing: Mapping[str, Any]) -> Array:
    """Return what a network sees of `image`, [size, size, 3] on the scale 0..255.

    Args:
        image: any mode, any size.
        preprocessing: "geometry" and "image_size" of a description. "crop": the centre, black
            outside of the image. "resize_crop": torchvision's Resize to 256/224 of the size and
            CenterCrop. "official": TensorFlow's resize_bicubic of the central square.

    Returns:
        uint8, or float32 for "official".
    """
    size, geometry = int(preprocessing["image_size"]), preprocessing["geometry"]
    image = image.convert("RGB")
    if geometry == "official":
        return _official(np.asarray(image), size)
    if geometry == "resize_crop":
        short, resized = min(image.size), size * 256 // 224
        width, height = (resized * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (_central_start(side, size) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _central_start(side: int, size: int) -> int:
    """Return the first pixel of a central window; half to even, as torchvision rounds."""
    return round((side - size) / 2) if side >= size else -((size - side) // 2)


def _official(image: Array, size: int) -> Array:
    height, width, _ = image.shape
    side = max(int(np.float32(size / (size + 32)) * np.float32(min(height, width))), 1)
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    window = image[top : top + side, left : left + side].astype(np.float32)
    indices, weights = _bicubic_taps(side, size)
    # The last bit depends on TensorFlow's order: down the columns first, tap by tap.
    lines = sum_of([window[i] * w[:, None, None] for i, w in zip(indices, weights, strict=True)])
    return sum_of([lines[:, i] * w[None, :, None] for i, w in zip(indices, weights, strict=True)])


def sum_of(taps: list[Array]) -> Array:
    """Return the sum in the order of the list."""
    total = taps[0]
    for tap in taps[1:]:
        total = total + tap
    return total


def _bicubic_taps(side: int, size: int) -> tuple[Array, Array]:
    """Return indices int64 [4, size] and weights float32 of cubic convolution with a = -0.75."""
    positions = np.arange(size, dtype=np.float32) * (np.float32(side) / np.float32(size))
    first = np.floor(positions)
    offsets = np.rint((positions - first) * TABLE_SIZE).astype(np.int64)
    a, near, far = -0.75, np.arange(TABLE_SIZE) / TABLE_SIZE, 1 + np.arange(TABLE_SIZE + 1) / TABLE_SIZE
    parts = [((a + 2) * near - (a + 3)) * near * near + 1, ((a * far - 5 * a) * far + 8 * a) * far - 4 * a]
    table = np.concatenate(parts).astype(np.float32)
    taps = (offsets + TABLE_SIZE, offsets, TABLE_SIZE - offsets, 2 * TABLE_SIZE - offsets)
    steps = np.arange(-1, 3)[:, None]
    indices = np.minimum(np.maximum(first.astype(np.int64) + steps, 0), side - 1)
    return indices, np.stack([table[tap] for tap in taps])
