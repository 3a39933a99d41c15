"""Crop and resize an image as the evaluation of a run does, with numpy and Pillow."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from bitfleet.packed.program import Array

TABLE_SIZE = 1024
"""TensorFlow looks up bicubic weights for a position rounded to 1/1024 pixel."""
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339  # tags of a TIFF
_WHITE_IS_ZERO, _SEPARATE_PLANES, _SIGNED = 0, 2, 2


def pixels_of(image: Image.Image, preprocessing: Mapping[str, Any]) -> Array:
    """Return what a network sees of `image`, [size, size, 3] on the scale 0..255.

    Args:
        image: any mode, any size.
        preprocessing: "geometry" and "image_size" of a description. "crop": the centre, black
            outside of the image. "resize_crop": torchvision's Resize to 256/224 of the size and
            CenterCrop. "official": TensorFlow's resize_bicubic of the central square.

    Returns:
        uint8, or float32 for "official".

    Raises:
        ValueError: as `grey_or_rgb`.
    """
    size, geometry = int(preprocessing["image_size"]), preprocessing["geometry"]
    image.load()  # which may change its mode
    image = grey_or_rgb(image).convert("RGB")
    if geometry == "official":
        return _official(np.asarray(image), size)
    if geometry == "resize_crop":
        short, resized = min(image.size), size * 256 // 224
        width, height = (resized * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (_central_start(side, size) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def grey_or_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded image in mode L or RGB, 8 bits per channel, in the stored orientation.

    Raises:
        ValueError: Its range of brightness is unknown, or Pillow reads it wrongly.
    """
    mode, bits = image.mode, 16
    image.info.pop("transparency", None)  # Pillow warns that it is lost, or looks for it among the pixels
    is_inverted = is_signed = False
    if isinstance(image, TiffImageFile):
        bits, is_inverted, is_signed = _tiff_numbers(image)
    if is_signed or mode == "F" or (mode == "I" and image.format not in ("PPM", "PNG")):
        raise ValueError(
            f"{image.format}, mode {mode}: its range of brightness is not known; store it with 8 or 16 bits a channel"
        )
    if mode.startswith("I"):
        grey = _scaled(np.asarray(image), (1 << bits) - 1)
        return Image.fromarray(255 - grey if is_inverted else grey)
    if mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes every such JPEG for Adobe's, which are inverted. DALI and libjpeg look at the
        # marker.
        image = Image.merge("CMYK", [band.point(lambda value: 255 - value) for band in image.split()])
    if mode in ("L", "RGB"):
        return image  # not a copy: a large image takes 0.7 GB
    return image.convert("L" if mode in ("1", "LA", "La") else "RGB")


def _tiff_numbers(image: TiffImageFile) -> tuple[int, bool, bool]:
    """Return bits per channel, whether white is 0, and whether numbers are signed.

    Pillow handles inversion only up to 8 bits, and reads signed 8-bit numbers as unsigned.
    """
    tags = image.tag_v2
    bits = int(np.max(tags.get(_BITS, 1)))
    if tags.get(_PLANAR) == _SEPARATE_PLANES and bits > 8 and len(image.getbands()) > 1:
        raise ValueError(
            f"a TIFF of {bits} bits a channel in separate planes, which Pillow reads wrongly: store it interleaved"
        )
    return bits, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO, _SIGNED in np.ravel(tags.get(_SAMPLE_FORMAT, 1))


def _scaled(values: NDArray[np.integer[Any]], largest: int) -> NDArray[np.uint8]:
    """Scale integers 0 .. `largest` to 0 .. 255, rounded to the nearest, as DALI does."""
    wide = values.astype(np.uint32)
    return np.minimum((wide * 255 + largest // 2) // largest, 255).astype(np.uint8)


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
