"""Which files are images that the decoders read: by suffix, and by content where the suffix does not say."""

import re

IMAGE_SUFFIXES = frozenset(
    ".jpeg .jpg .jpe .jfif .jif .jfi .mpo .png .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .j2c .jpc .jpf .jpx".split()
)
"""Suffixes, in lower case, of images: a file with one is an image, and if it cannot be read, a broken one."""
TEXT_SUFFIXES = frozenset(".txt .md .rst .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .log .py .sh .cls".split())
"""Suffixes of what lies beside images and is none; their content is not looked at."""

HEAD_BYTES = 32
"""So much of a file is enough for `is_image`."""
_MAGIC = re.compile(
    rb"\xff\xd8\xff"  # JPEG
    rb"|\x89PNG\r\n\x1a\n"
    rb"|RIFF....WEBP"
    rb"|II[*+]\x00|MM\x00[*+]"  # TIFF and BigTIFF
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00"  # BMP: two letters, so the size of its second header is asked for, too
    rb"|P[1-6][ \t\r\n]+[0-9#]"  # PBM, PGM, PPM
    rb"|\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",  # JPEG 2000
    re.DOTALL,
)
_SYSTEM_FILES = frozenset(
    (".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", ".localized", ".directory")
)
_SYSTEM_FOLDERS = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"))


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot: "" for "photo", ".jpg" for "a.b.JPG"."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""


def is_image(head: bytes) -> bool:
    """Whether a file that begins with `head` is of a format that the decoders read."""
    return _MAGIC.match(head) is not None


def is_of_system(name: str) -> bool:
    """Whether a file is one that an operating system leaves in every folder, like .DS_Store, ._photo.jpg and Thumbs.db."""
    return name.startswith("._") or name.lower() in _SYSTEM_FILES


def is_folder_of_system(name: str) -> bool:
    """Whether a folder is one that a system or a packer makes by itself, like __MACOSX."""
    return name.lower() in _SYSTEM_FOLDERS
