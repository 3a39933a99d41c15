"""Oddities: images of every odd kind, told from their headers."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from bitfleet.trainer.data.oddities import KINDS, oddities
from tests.unit.trainer.data.test_images import photo


def sixteen_bit_rgb_png(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = np.random.default_rng(0).integers(0, 65536, (40, 36 * 3), dtype=np.uint16).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", 36, 40, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


def become_ycck(path: Path) -> None:
    jpeg = bytearray(path.read_bytes())
    transform = jpeg.index(b"Adobe") + 11
    assert jpeg[transform] == 0
    jpeg[transform] = 2
    path.write_bytes(jpeg)


def write_odd(folder: Path) -> None:
    """One of each kind of odd image that training reads."""
    image = photo(40, 36)
    image.save(folder / "plain.JPEG")
    image.save(folder / "progressive.jpg", progressive=True)
    photo(1, 1).save(folder / "one_pixel.jpg")
    image.convert("L").save(folder / "grey.JPEG")
    image.convert("CMYK").save(folder / "cmyk.JPEG")
    image.convert("CMYK").save(folder / "ycck.JPEG")
    become_ycck(folder / "ycck.JPEG")
    image.save(folder / "really_a_png.JPEG", format="PNG")
    image.save(folder / "really_a_bmp.JPEG", format="BMP")
    image.save(folder / "really_a_jpeg.png", format="JPEG")
    image.convert("P").save(folder / "palette.png")
    image.convert("P").save(folder / "clear_palette.png", transparency=bytes(range(256)))
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("LA").save(folder / "grey_alpha.png")
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(wide).save(folder / "grey16.png")
    Image.fromarray(wide).save(folder / "grey16.tif")
    sixteen_bit_rgb_png(folder / "rgb16.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.jpg", exif=exif)
    image.save(folder / "rotated.webp", exif=exif)
    exif[0x0112] = 1
    image.save(folder / "upright.jpg", exif=exif)
    image.save(folder / "broken_exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03")


ODD = {
    "grey.JPEG": ["grey"],
    "cmyk.JPEG": ["cmyk"],
    "ycck.JPEG": ["ycck"],
    "really_a_png.JPEG": ["format"],
    "really_a_bmp.JPEG": ["format"],
    "really_a_jpeg.png": ["format"],
    "palette.png": ["palette"],
    "clear_palette.png": ["palette", "alpha"],
    "alpha.png": ["alpha"],
    "grey_alpha.png": ["grey", "alpha"],
    "grey16.png": ["grey", "16-bit"],
    "grey16.tif": ["grey", "16-bit"],
    "rgb16.png": ["16-bit"],
    "rotated.jpg": ["rotated"],
    "rotated.webp": ["rotated"],
}


def test_every_kind_is_told_from_the_header(tmp_path: Path) -> None:
    write_odd(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the broken EXIF
        found = {path.name: oddities(path.read_bytes(), path.name) for path in tmp_path.iterdir()}
    assert {name: [kind for kind, _ in kinds] for name, kinds in found.items() if kinds} == ODD
    assert {kind for kinds in found.values() for kind, _ in kinds} == set(KINDS)
    assert found["rotated.jpg"] == [("rotated", "orientation 6")]
    assert found["really_a_png.JPEG"] == [("format", "PNG named .JPEG")]


def test_what_pillow_does_not_know_has_no_oddity() -> None:
    assert oddities(b"<html>", "page.jpg") == []
