"""Pillow on one image: its pixels as every loader gives them, or why it cannot be read.

DALI decodes JPEG, PNG and WebP, to the same pixels but for rounding. What it reads otherwise or not at all is decoded here in
every loader (dali.py, whole.py), so this file says what an odd image looks like.
"""

import io
import os
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from bitfleet.trainer.data.request import Request

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of what is read, whatever the suffix says: ImageNet has a PNG named .JPEG."""
MOST_PIXELS = 178_956_970
"""Larger images are refused: Pillow's own limit. One of that size has 0.54 GB of pixels, in Pillow 0.72 GB."""

_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339  # tags of a TIFF
_WHITE_IS_ZERO, _APART, _SIGNED = 0, 2, 2

# Pillow warns of images of half that size and has an error with another text for larger ones; `opened` has one rule for both.
Image.MAX_IMAGE_PIXELS = None


def opened(file: str | IO[bytes]) -> Image.Image:
    """Open an image at a path or in an open file; only its header is read.

    Raises:
        ValueError: It is not an image or too large; the message is the bare reason.
        OSError: It cannot be read.
    """
    try:
        image = Image.open(file)
    except UnidentifiedImageError:  # its text is the address of the buffer
        raise ValueError("it is not an image" if _has_content(file) else "the file is empty") from None
    except SyntaxError as error:
        raise ValueError(str(error)) from None
    if (num_pixels := image.width * image.height) > MOST_PIXELS:
        image.close()
        raise ValueError(
            f"it has {image.width} x {image.height} = {num_pixels:,} pixels, and at most {MOST_PIXELS:,} are read: make it "
            "smaller"
        )
    return image


def _has_content(file: str | IO[bytes]) -> bool:
    if isinstance(file, str):
        return os.path.getsize(file) > 0
    file.seek(0)
    return bool(file.read(1))


def decode(encoded: bytes) -> Image.Image:
    """Return the pixels of an encoded image, mode RGB.

    Raises:
        ValueError: It does not decode, or not to known colours; the message is the bare reason.
    """
    try:
        with opened(io.BytesIO(encoded)) as image:
            if image.format not in FORMATS:
                raise ValueError(f"it is a {image.format} file, which bitfleet does not read")
            image.load()
            read = grey_or_rgb(image)
            return read if read.mode == "RGB" else read.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # broken files raise nearly anything in Pillow
        raise ValueError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


def grey_or_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded image in mode L or RGB: 8 bits a channel, without transparency, the stored orientation.

    Raises:
        ValueError: Its range of brightness is not known, or Pillow reads it wrongly.
    """
    mode, bits = image.mode, 16
    image.info.pop("transparency", None)  # Pillow warns that it is lost, or looks for it among the pixels
    is_inverted = has_sign = False
    if isinstance(image, TiffImageFile):
        bits, is_inverted, has_sign = _facts_of_tiff(image)
    if has_sign or mode == "F" or (mode == "I" and image.format not in ("PPM", "PNG")):
        raise ValueError(
            f"{image.format}, mode {mode}: its range of brightness is not known; store it with 8 or 16 bits a channel"
        )
    if mode.startswith("I"):
        grey = _scaled(np.asarray(image), (1 << bits) - 1)
        return Image.fromarray(255 - grey if is_inverted else grey)
    if mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes every such JPEG for Adobe's, which are inverted. DALI and libjpeg's users look at the marker.
        image = Image.merge("CMYK", [band.point(lambda value: 255 - value) for band in image.split()])
    if mode in ("L", "RGB"):
        return image  # and no copy: one of a large image has 0.7 GB
    return image.convert("L" if mode in ("1", "LA", "La") else "RGB")


def _facts_of_tiff(image: TiffImageFile) -> tuple[int, bool, bool]:
    """Bits of a channel, whether white is 0, which Pillow sees to but for more than 8 bits, and whether numbers have a sign.

    Pillow reads numbers of 8 bits with a sign as if they had none.
    """
    tags = image.tag_v2
    bits = int(np.max(tags.get(_BITS, 1)))
    if tags.get(_PLANAR) == _APART and bits > 8 and len(image.getbands()) > 1:
        raise ValueError(
            f"a TIFF of {bits} bits a channel in separate planes, which Pillow reads wrongly: store it interleaved"
        )
    return bits, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO, _SIGNED in np.ravel(tags.get(_SAMPLE_FORMAT, 1))


def _scaled(values: npt.NDArray[np.integer], largest: int) -> npt.NDArray[np.uint8]:
    """Integers of 0 .. `largest` as 0 .. 255, rounded to the nearest, as DALI does."""
    wide = values.astype(np.uint32)
    return np.minimum((wide * 255 + largest // 2) // largest, 255).astype(np.uint8)


def image_of(request: Request, position: int) -> Image.Image:
    """Return the pixels of the image at `position`, mode RGB.

    Raises:
        OSError: It cannot be read.
        ValueError: It cannot be decoded, or is not what the list says.
    """
    images, sample = request.images, int(request.samples[position])
    height, width = int(images.heights[sample]), int(images.widths[sample])
    image = decode(request.read(position))
    if (image.height, image.width) != (height, width):
        raise ValueError(f"it has {image.width} x {image.height} pixels now, and had {width} x {height}")
    return image


def reason_of(request: Request, position: int) -> str | None:
    """Why the image at `position` cannot be read, or is not what the list says; None if Pillow finds no fault."""
    try:
        image_of(request, position)
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return None
