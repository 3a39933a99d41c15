"""What is odd about an image, from its header: training reads such images, but their owner should know of them."""

import io
import os

import numpy as np
from PIL import ExifTags, Image

from bitfleet.trainer.data.decoding import MOST_PIXELS, opened

KINDS = {
    "cmyk": "CMYK, read as RGB",
    "ycck": "YCCK, read as RGB",
    "colour": "LAB or YCbCr, read as RGB",
    "grey": "grey, read as RGB",
    "palette": "with a palette, read as RGB",
    "alpha": "with transparency, read without it",
    "16-bit": "of 16 bits a channel, read as 8",
    "profile": "with a colour profile or gamma other than sRGB's, which is not applied",
    "frames": "of several pictures, of which the first is read",
    "rotated": "turned by EXIF, read as they are stored",
    "turned": "TIFF files turned by their orientation, read turned",
    "long": "more than 24 times as long as wide, of which a crop shows little",
    "large": "of more than 89 million pixels, which take 0.27 to 0.72 GB each while they are decoded",
    "pillow": "that DALI does not read or reads otherwise, read by Pillow with every loader",
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
_LONG, _LARGE = 24, MOST_PIXELS // 2
_SRGB_GAMMA, _SRGB_NAMES = 1 / 2.2, (b"sRGB", "sRGB".encode("utf-16-be"))  # as versions 2 and 4 of ICC write it


def oddities(encoded: bytes, name: str, *, by_pillow: bool = False) -> list[tuple[str, str]]:
    """Return (kind, detail) of everything that is odd, in the order of KINDS; nothing where Pillow knows no such header.

    Args:
        encoded: The file.
        name: Its name; only the suffix counts.
        by_pillow: Pillow decoded it.
    """
    try:
        with opened(io.BytesIO(encoded)) as image:
            found = _of_colours(image, encoded) | _of_shape(image)
            form, suffix = str(image.format), os.path.splitext(name)[1]
    except Exception:  # a broken header raises nearly anything in Pillow; whether it decodes is for the decoders to say
        return []
    if by_pillow:
        found["pillow"] = form
    if form not in _SUFFIX_FORMATS.get(suffix.lower(), (form,)):
        found["format"] = f"{form} named {suffix}"
    return [(kind, found[kind]) for kind in KINDS if kind in found]


def _of_colours(image: Image.Image, encoded: bytes) -> dict[str, str]:
    found = {}
    mode, form = image.mode, str(image.format)
    if mode == "CMYK":
        found["ycck" if form == "JPEG" and image.info.get("adobe_transform") == 2 else "cmyk"] = f"{form}, 4 channels"
    if mode in ("LAB", "YCbCr"):
        found["colour"] = f"{form}, mode {mode}"
    if mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;"):
        found["grey"] = f"{form}, mode {mode}"
    if mode in ("P", "PA"):
        found["palette"] = f"{form}, mode {mode}"
    if mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        found["alpha"] = f"{form}, mode {mode}"
    if (depth := _bits(image, encoded)) > 8:
        found["16-bit"] = f"{form}, {depth} bits"
    if profile := _profile(image):
        found["profile"] = f"{form}, {profile}"
    return found


def _of_shape(image: Image.Image) -> dict[str, str]:
    found = {}
    form, (width, height) = str(image.format), image.size
    if (frames := getattr(image, "n_frames", 1)) > 1:
        found["frames"] = f"{form}, {frames} pictures"
    if (orientation := _orientation(image)) in range(2, 9):
        found["turned" if form == "TIFF" else "rotated"] = f"orientation {orientation}"
    if max(width, height) > _LONG * min(width, height):
        found["long"] = f"{width} x {height} pixels"
    if width * height > _LARGE:
        found["large"] = f"{width} x {height} pixels"
    return found


def _bits(image: Image.Image, encoded: bytes) -> int:
    """Bits of a channel."""
    if image.format == "PNG":  # Pillow reads 16-bit RGB as 8-bit and does not say so
        return encoded[_PNG_DEPTH_BYTE]
    if image.format == "TIFF":
        return int(np.max(image.getexif().get(_TIFF_BITS_PER_SAMPLE, 8)))
    return 16 if image.mode.startswith("I") else 8


def _profile(image: Image.Image) -> str | None:
    """What the colours of the image are made for, where it says so and it is not sRGB."""
    if icc := image.info.get("icc_profile"):
        return None if any(name in icc for name in _SRGB_NAMES) else f"an ICC profile of {len(icc):,} bytes"
    gamma = image.info.get("gamma")
    if gamma is None or "srgb" in image.info or abs(gamma - _SRGB_GAMMA) < 0.01:
        return None
    return f"gamma {gamma:g}"


def _orientation(image: Image.Image) -> object:
    if image.format not in _EXIF_FORMATS:
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # several of ImageNet's files have broken EXIF and whole pixels
        return 1
