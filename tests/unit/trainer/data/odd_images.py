"""Images of every odd kind with the pixels that each loader should give, and writers of files that
Pillow does not write."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.unit.trainer.data.test_images import photo

Pixels = npt.NDArray[np.generic]

PHOTO = photo(40, 36)
RGB = np.asarray(PHOTO)
GREY = np.asarray(PHOTO.convert("L"))
_LOW = np.random.default_rng(0).integers(0, 256, RGB.shape, dtype=np.uint16)
RGB16 = RGB.astype(np.uint16) << 8 | _LOW
GREY16 = GREY.astype(np.uint16) << 8 | _LOW[..., 0]
ALPHA = np.tile(np.linspace(0, 255, 36).astype(np.uint8), (40, 1))
WHITE_IS_ZERO, BLACK_IS_ZERO, AS_RGB, CIELAB = 0, 1, 2, 8  # photometric interpretations of a TIFF


def to_8_bits(pixels: Pixels, largest: int = 65535) -> npt.NDArray[np.uint8]:
    """Rounded to the nearest of 0 .. 255."""
    return np.round(pixels.astype(np.float64) * 255 / largest).astype(np.uint8)


def write_png(
    path: Path, pixels: Pixels, colour: int, depth: int = 16, chunks: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Write [H, W] or [H, W, C] of 8 or 16 bits; `colour` is PNG's colour type, `chunks` stand
    before the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1).astype(">u2" if depth == 16 else "u1")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*each) for each in chunks) + data + chunk(b"IEND", b"")
    )


def write_tiff(path: Path, pixels: Pixels, photometric: int, *, order: str = "<", planes: bool = False) -> None:
    """Write [H, W] or [H, W, C] of any type, uncompressed, in one strip or one a channel; `order`
    is "<" or ">"."""
    pixels = np.atleast_3d(pixels)
    height, width, channels = pixels.shape
    ordered = pixels.astype(pixels.dtype.newbyteorder(order))  # type: ignore[call-overload]
    strips = (
        [np.ascontiguousarray(ordered[..., k]).tobytes() for k in range(channels)] if planes else [ordered.tobytes()]
    )
    bits, kind = pixels.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    entries = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [bits] * channels),
        (259, "H", [1]),
        (262, "H", [photometric]),
        (273, "I", [0] * len(strips)),
        (277, "H", [channels]),
        (278, "I", [height]),
        (279, "I", [len(strip) for strip in strips]),
        (284, "H", [2 if planes else 1]),
        (339, "H", [kind] * channels),
    ]
    write_tags(path, entries, strips, order)


def write_tags(path: Path, entries: list[tuple[int, str, list[int]]], strips: list[bytes], order: str = "<") -> None:
    """Write a TIFF of these tags (number, "H" or "I", values; the offsets of 273 are filled in) and
    strips."""
    directory = 8 + 2 + 12 * len(entries) + 4
    behind = sum(size for _, form, values in entries if (size := len(values) * struct.calcsize(form)) > 4)
    starts = np.cumsum([directory + behind, *map(len, strips)])[:-1].tolist()
    table, values_behind = b"", b""
    for tag, form, values in entries:
        packed = struct.pack(order + form * len(values), *(starts if tag == 273 else values))
        if len(packed) > 4:
            place = struct.pack(order + "I", directory + len(values_behind))
            values_behind += packed
        else:
            place = packed.ljust(4, b"\0")
        table += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[form], len(values)) + place
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HIH", 42, 8, len(entries))
    path.write_bytes(head + table + b"\0" * 4 + values_behind + b"".join(strips))


def write_twelve_bits(path: Path) -> None:
    """The grey photo as a TIFF of 12 bits, two pixels in three bytes."""
    values = (GREY16 >> 4).reshape(-1, 2).astype(np.uint32)
    both = values[:, 0] << 12 | values[:, 1]
    packed = np.stack([both >> 16, both >> 8 & 255, both & 255], axis=1).astype(np.uint8).tobytes()
    entries = [(256, "I", [36]), (257, "I", [40]), (258, "H", [12]), (259, "H", [1]), (262, "H", [1]), (273, "I", [0])]
    write_tags(path, [*entries, (277, "H", [1]), (278, "I", [40]), (279, "I", [len(packed)])], [packed])


def write_bmp16(path: Path, masks: tuple[int, int, int] | None) -> None:
    """The photo as a BMP of 16 bits a pixel: 5-5-5, or as the three masks say."""
    values = np.zeros((40, 36), np.uint32)
    for channel, mask in enumerate(masks or (0x7C00, 0x3E0, 0x1F)):
        lowest = mask & -mask
        values |= np.round(RGB[..., channel].astype(np.float64) * (mask // lowest) / 255).astype(np.uint32) * lowest
    data = values[::-1].astype("<u2").tobytes()
    extra = b"" if masks is None else struct.pack("<III", *masks)
    offset = 54 + len(extra)
    header = struct.pack("<IiiHHIIiiII", 40, 36, 40, 1, 16, 0 if masks is None else 3, len(data), 0, 0, 0, 0)
    path.write_bytes(b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + extra + data)


def without_adobe_marker(jpeg: bytes) -> bytes:
    """The JPEG without its segment APP14."""
    start = jpeg.index(b"Adobe") - 4
    (length,) = struct.unpack(">H", jpeg[start + 2 : start + 4])
    return jpeg[:start] + jpeg[start + 2 + length :]


def write_odd_pixels(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Write images of every odd kind; returns the pixels [40, 36] or [40, 36, 3] of each, by
    name."""
    return {**_of_16_bits(folder), **_of_other_colours(folder), **_of_containers(folder)}


def _of_16_bits(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    alpha = ALPHA.astype(np.uint16) * 257
    Image.fromarray(GREY16).save(folder / "grey16.png")
    Image.fromarray(GREY16).save(folder / "grey16.tif")
    write_tiff(folder / "grey16_big.tif", GREY16, BLACK_IS_ZERO, order=">")
    write_tiff(folder / "grey16_white.tif", GREY16, WHITE_IS_ZERO)
    write_twelve_bits(folder / "grey12.tif")
    (folder / "grey16.ppm").write_bytes(b"P5 36 40 65535\n" + GREY16.astype(">u2").tobytes())
    (folder / "grey10.ppm").write_bytes(b"P5 36 40 1023\n" + (GREY16 >> 6).astype(">u2").tobytes())
    (folder / "rgb10.ppm").write_bytes(b"P6 36 40 1023\n" + (RGB16 >> 6).astype(">u2").tobytes())
    (folder / "rgb4.ppm").write_bytes(b"P6 36 40 15\n" + (RGB >> 4).tobytes())
    write_png(folder / "rgb16.png", RGB16, 2)
    write_png(folder / "grey16_gamma.png", GREY16, 0, chunks=[(b"gAMA", struct.pack(">I", 100_000))])
    write_png(folder / "grey16_12_used.png", GREY16 >> 4 << 4, 0, chunks=[(b"sBIT", b"\x0c")])
    write_png(folder / "rgba16.png", np.dstack([RGB16, alpha]), 6)
    write_png(folder / "grey_alpha16.png", np.dstack([GREY16, alpha]), 4)
    write_tiff(folder / "rgb16.tif", RGB16, AS_RGB)
    write_tiff(folder / "rgb16_big.tif", RGB16, AS_RGB, order=">")
    grey, rgb = to_8_bits(GREY16), to_8_bits(RGB16)
    return {
        **dict.fromkeys(("grey16.png", "grey16.tif", "grey16_big.tif", "grey16.ppm", "grey16_gamma.png"), grey),
        "grey16_white.tif": 255 - grey,
        "grey12.tif": to_8_bits(GREY16 >> 4, 4095),
        "grey10.ppm": to_8_bits(GREY16 >> 6, 1023),
        "grey16_12_used.png": to_8_bits(GREY16 >> 4 << 4),
        "grey_alpha16.png": grey,
        "rgb10.ppm": to_8_bits(RGB16 >> 6, 1023),
        "rgb4.ppm": to_8_bits(RGB >> 4, 15),
        **dict.fromkeys(("rgb16.png", "rgba16.png", "rgb16.tif", "rgb16_big.tif"), rgb),
    }


def _of_other_colours(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    cmyk = PHOTO.convert("CMYK")
    cmyk.save(folder / "cmyk.tif")
    cmyk.save(folder / "cmyk.jpg", quality=100, subsampling=0)
    inverted = Image.fromarray(255 - np.asarray(cmyk), "CMYK")
    inverted.save(folder / "cmyk_plain.jpg", quality=100, subsampling=0)
    (folder / "cmyk_plain.jpg").write_bytes(without_adobe_marker((folder / "cmyk_plain.jpg").read_bytes()))
    PHOTO.convert("YCbCr").save(folder / "ycbcr.tif")
    no_colour = np.zeros((40, 36, 2), np.uint8)  # a* and b* have a sign
    write_tiff(folder / "lab.tif", np.dstack([GREY, no_colour]), CIELAB)
    palette = PHOTO.quantize(64)
    palette.save(folder / "palette.tif")
    palette.save(folder / "palette_clear.png", transparency=bytes(range(0, 256, 4)))
    rgba, grey_alpha = Image.fromarray(np.dstack([RGB, ALPHA])), Image.fromarray(np.dstack([GREY, ALPHA]))
    for suffix in ("png", "tif", "webp", "bmp"):
        rgba.save(folder / f"rgba.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    for suffix in ("png", "tif"):
        grey_alpha.save(folder / f"grey_alpha.{suffix}")
    bits = PHOTO.convert("1")
    for suffix in ("png", "tif", "bmp"):
        bits.save(folder / f"1.{suffix}")
    bits.save(folder / "1_fax.tif", compression="group4")
    write_bmp16(folder / "555.bmp", None)
    write_bmp16(folder / "565.bmp", (0xF800, 0x7E0, 0x1F))
    write_png(folder / "linear.png", RGB, 2, 8, [(b"gAMA", struct.pack(">I", 100_000))])
    write_tiff(folder / "planes.tif", RGB, AS_RGB, planes=True)
    write_tiff(folder / "white.tif", GREY, WHITE_IS_ZERO)
    quantized, two = np.asarray(palette.convert("RGB")), np.asarray(bits).astype(np.uint8) * 255
    names = ("cmyk.tif", "cmyk.jpg", "cmyk_plain.jpg", "ycbcr.tif", "linear.png", "planes.tif", "555.bmp", "565.bmp")
    return {
        **dict.fromkeys((*names, "rgba.png", "rgba.tif", "rgba.webp", "rgba.bmp"), RGB),
        **dict.fromkeys(("palette.tif", "palette_clear.png"), quantized),
        **dict.fromkeys(("grey_alpha.png", "grey_alpha.tif"), GREY),
        **dict.fromkeys(("1.png", "1.tif", "1.bmp", "1_fax.tif"), two),
        "white.tif": 255 - GREY,
        "lab.tif": lightness_as_grey(GREY),
    }


def lightness_as_grey(lightness: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """CIE L* of 0 .. 255 without a colour as sRGB."""
    level = lightness.astype(np.float64) * 100 / 255
    linear = np.where(level > 8, ((level + 16) / 116) ** 3, level / 903.3)
    grey = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return np.round(255 * grey).clip(0, 255).astype(np.uint8)


def _of_containers(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    other = Image.new("RGB", PHOTO.size, "red")
    more = {"save_all": True, "append_images": [other]}
    PHOTO.save(folder / "several.webp", lossless=True, **more)
    PHOTO.save(folder / "several.png", **more)
    PHOTO.save(folder / "several.tif", **more)
    PHOTO.save(folder / "several.jpg", "MPO", quality=100, subsampling=0, **more)
    exif = Image.Exif()
    exif[0x0112] = 3
    PHOTO.save(folder / "rotated.webp", lossless=True, exif=exif)
    PHOTO.save(folder / "rotated.png", exif=exif)
    PHOTO.save(folder / "rotated.jpg", exif=exif, quality=100, subsampling=0)
    PHOTO.save(folder / "turned.tif", tiffinfo={0x0112: 3})
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"):
        PHOTO.save(folder / f"{compression}.tif", compression=compression)
    PHOTO.save(folder / "jpeg.tif", compression="jpeg", quality=100)
    PHOTO.save(folder / "no_end.png")
    (folder / "no_end.png").write_bytes((folder / "no_end.png").read_bytes()[:-12])
    PHOTO.save(folder / "really_lzma_tiff.jpg", "TIFF", compression="lzma")
    write_bmp16(folder / "really_565_bmp.jpg", (0xF800, 0x7E0, 0x1F))
    (folder / "text.ppm").write_bytes(b"P3 36 40 255\n" + " ".join(map(str, RGB.ravel().tolist())).encode())
    stored = {path.name: RGB for path in folder.iterdir() if path.name.startswith(("several", "rotated", "tiff_"))}
    names = (
        "packbits.tif",
        "lzma.tif",
        "zstd.tif",
        "jpeg.tif",
        "no_end.png",
        "really_lzma_tiff.jpg",
        "really_565_bmp.jpg",
    )
    return {**stored, **dict.fromkeys((*names, "text.ppm"), RGB), "turned.tif": RGB[::-1, ::-1]}


def write_refused(folder: Path) -> dict[str, str]:
    """Write what no loader reads; name -> why."""
    share = (GREY16 / 65535).astype(np.float32)
    write_tiff(folder / "float.tif", share, BLACK_IS_ZERO)
    write_tiff(folder / "float_big.tif", share * 255, BLACK_IS_ZERO, order=">")
    write_tiff(folder / "int32.tif", GREY16.astype(np.int32), BLACK_IS_ZERO)
    write_tiff(folder / "uint32.tif", GREY16.astype(np.uint32), BLACK_IS_ZERO)
    write_tiff(folder / "signed16.tif", (GREY16 >> 1).astype(np.int16), BLACK_IS_ZERO)
    write_tiff(folder / "signed8.tif", (GREY >> 1).astype(np.int8), BLACK_IS_ZERO)
    write_tiff(folder / "planes16.tif", RGB16, AS_RGB, planes=True)
    Image.fromarray(share).save(folder / "really_a_float_tiff.png", "TIFF")
    unknown = r"its range of brightness is not known; store it with 8 or 16 bits"
    names = (
        "float.tif",
        "float_big.tif",
        "int32.tif",
        "uint32.tif",
        "signed16.tif",
        "signed8.tif",
        "really_a_float_tiff.png",
    )
    return {**dict.fromkeys(names, unknown), "planes16.tif": "in separate planes"}
