"""Recognise image files and decode them with Pillow.

DALI decodes JPEG, PNG and WebP to the same pixels but for rounding. What it reads differently or
not at all is decoded here by every loader, so this file, with packed/pixels.py, defines the pixels
of an unusual image.
"""

import io
import os
import re
from typing import IO

from PIL import Image, UnidentifiedImageError

from bitfleet.packed.pixels import grey_or_rgb

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of the formats that are read, whatever the suffix."""
MOST_PIXELS = 178_956_970
"""Larger images are refused (Pillow's own limit): 0.54 GB of pixels, 0.72 GB in Pillow."""
IMAGE_SUFFIXES = frozenset(
    (
        ".jpeg .jpg .jpe .jfif .jif .jfi .mpo .png .bmp .webp .tif .tiff "
        ".ppm .pgm .pbm .pnm .jp2 .j2k .j2c .jpc .jpf .jpx"
    ).split()
)
"""Lower-case suffixes of images; such a file is an image even if it cannot be read."""
TEXT_SUFFIXES = frozenset(".txt .md .rst .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .log .py .sh .cls".split())
"""Lower-case suffixes of files that are not images; their content is not looked at."""
HEAD_BYTES = 32
"""Number of leading bytes that `is_image` needs."""

_MAGIC = re.compile(
    rb"\xff\xd8\xff"  # JPEG
    rb"|\x89PNG\r\n\x1a\n"
    rb"|RIFF....WEBP"
    rb"|II[*+]\x00|MM\x00[*+]"  # TIFF and BigTIFF
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00"  # BMP: two letters, so check the size of its second header
    rb"|P[1-6][ \t\r\n]+[0-9#]"  # PBM, PGM, PPM
    rb"|\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",  # JPEG 2000
    re.DOTALL,
)
_SYSTEM_FILES = (".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", ".localized", ".directory")
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")

# Pillow warns above half of MOST_PIXELS and has its own error above; `opened` applies one rule
# instead.
Image.MAX_IMAGE_PIXELS = None


def suffix_of(name: str) -> str:
    """Return the suffix in lower case with its dot: "" for "photo", ".jpg" for "a.b.JPG"."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def is_image(head: bytes) -> bool:
    """Return True if a file that starts with `head` has a format that is read."""
    return _MAGIC.match(head) is not None


def is_system_file(name: str) -> bool:
    """Return True for files of operating systems, like .DS_Store, ._photo.jpg, Thumbs.db."""
    return name.startswith("._") or name.lower() in _SYSTEM_FILES


def is_system_folder(name: str) -> bool:
    """Return True for folders that operating systems and packers add, like __MACOSX."""
    return name.lower() in _SYSTEM_FOLDERS


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
            f"it has {image.width} x {image.height} = {num_pixels:,} pixels, and at most {MOST_PIXELS:,} are read: "
            "make it smaller"
        )
    return image


def _has_content(file: str | IO[bytes]) -> bool:
    if isinstance(file, str):
        return os.path.getsize(file) > 0
    file.seek(0)
    return bool(file.read(1))


def header_size(file: str | IO[bytes]) -> tuple[int, int]:
    """Return height and width in pixels from the header of an image, at a path or in an open file.

    Raises:
        ValueError: It is missing, unreadable, too large or of another format; the message is the
            bare reason.
    """
    try:
        with opened(file) as image:
            is_pfm = image.format == "PPM" and image.mode == "F"
            if image.format not in FORMATS or is_pfm:
                raise ValueError(f"it is a {'PFM' if is_pfm else image.format} file, which bitfleet does not read")
            return image.height, image.width
    except FileNotFoundError:
        is_link = isinstance(file, str) and os.path.islink(file)
        raise ValueError("a link to nothing" if is_link else "the file is missing") from None
    except Exception as error:  # a broken header raises nearly anything in Pillow
        raise ValueError(_reason(error)) from None


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
            pixels = grey_or_rgb(image)
            return pixels if pixels.mode == "RGB" else pixels.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # broken files raise nearly anything in Pillow
        raise ValueError(_reason(error)) from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
