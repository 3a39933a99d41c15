"""What is odd about an image, from its header: training reads such images, but their owner should know of them."""

import io
import os

import numpy as np
from PIL import ExifTags, Image

KINDS = {
    "cmyk": "CMYK, read as RGB",
    "ycck": "YCCK, read as RGB",
    "grey": "grey, read as RGB",
    "palette": "with a palette, read as RGB",
    "alpha": "with transparency, read without it",
    "16-bit": "of 16 bits a channel, read as 8",
    "rotated": "turned by EXIF, read as they are stored",
    "format": "of another format than the name says, read as what they are",
}
"""Kind -> what it is and how training reads it, in the order of a report."""

_SUFFIX_FORMATS = {
    ".jpeg": ("JPEG", "MPO"),
    ".jpg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".bmp": ("BMP",),
    ".webp": ("WEBP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".ppm": ("PPM",),
}
# Pillow decodes a whole PNG to look for EXIF behind the pixels.
_EXIF_FORMATS = ("JPEG", "MPO", "TIFF", "WEBP")
_TIFF_BITS_PER_SAMPLE = 258
_PNG_DEPTH_BYTE = 24  # IHDR is always the first chunk: signature 8, length 4, "IHDR" 4, width 4, height 4, bit depth


def oddities(encoded: bytes, name: str) -> list[tuple[str, str]]:
    """Return (kind, detail) of everything that is odd, in the order of KINDS; nothing where Pillow knows no such header.

    Args:
        encoded: The file.
        name: Its name; only the suffix counts.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return _of_header(image, encoded, os.path.splitext(name)[1])
    except Exception:  # a broken header raises nearly anything in Pillow; whether the image decodes is for DALI to say
        return []


def _of_header(image: Image.Image, encoded: bytes, suffix: str) -> list[tuple[str, str]]:
    found = {}
    mode, form = image.mode, str(image.format)
    if mode == "CMYK":
        found["ycck" if form == "JPEG" and image.info.get("adobe_transform") == 2 else "cmyk"] = f"{form}, 4 channels"
    if mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;"):
        found["grey"] = f"{form}, mode {mode}"
    if mode in ("P", "PA"):
        found["palette"] = f"{form}, mode {mode}"
    if mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        found["alpha"] = f"{form}, mode {mode}"
    if (depth := _bits(image, encoded)) > 8:
        found["16-bit"] = f"{form}, {depth} bits"
    if (orientation := _orientation(image)) in range(2, 9):
        found["rotated"] = f"orientation {orientation}"
    if form not in _SUFFIX_FORMATS.get(suffix.lower(), (form,)):
        found["format"] = f"{form} named {suffix}"
    return [(kind, found[kind]) for kind in KINDS if kind in found]


def _bits(image: Image.Image, encoded: bytes) -> int:
    """Bits of a channel."""
    if image.format == "PNG":  # Pillow reads 16-bit RGB as 8-bit and does not say so
        return encoded[_PNG_DEPTH_BYTE]
    if image.format == "TIFF":
        return int(np.max(image.getexif().get(_TIFF_BITS_PER_SAMPLE, 8)))
    return 16 if image.mode.startswith("I") else 8


def _orientation(image: Image.Image) -> object:
    if image.format not in _EXIF_FORMATS:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # several of ImageNet's files have broken EXIF and whole pixels
        return 1
