"""Oddities: images of every odd kind, told from their headers."""

import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from bitfleet.launch.data.oddities import KINDS, oddities
from tests.unit.trainer.data.odd_images import AS_RGB, CIELAB, write_png, write_tiff
from tests.unit.trainer.data.test_images import photo


def sixteen_bit_rgb_png(path: Path) -> None:
    write_png(path, np.random.default_rng(0).integers(0, 65536, (40, 36, 3), dtype=np.uint16), 2)


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
    write_tiff(folder / "lab.tif", np.zeros((40, 36, 3), np.uint8), CIELAB)
    write_tiff(folder / "planes.tif", np.asarray(image), AS_RGB, planes=True)
    image.save(folder / "turned.tif", tiffinfo={0x0112: 3})
    image.save(folder / "several.png", save_all=True, append_images=[photo(40, 36, 1)])
    image.save(folder / "phone.jpg", "MPO", save_all=True, append_images=[photo(40, 36, 1)])
    photo(1, 25).save(folder / "long.png")
    photo(1, 24).save(folder / "not_long.png")
    image.save(folder / "srgb.jpg", icc_profile=profile("sRGB"))
    image.save(folder / "lab_profile.jpg", icc_profile=profile("LAB"))
    write_png(folder / "linear.png", np.asarray(image), 2, 8, [(b"gAMA", struct.pack(">I", 100_000))])
    write_png(folder / "srgb_gamma.png", np.asarray(image), 2, 8, [(b"gAMA", struct.pack(">I", 45_455))])
    image.save(folder / "no_end.png")
    (folder / "no_end.png").write_bytes((folder / "no_end.png").read_bytes()[:-12])
    image.save(folder / "broken_exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03")


ODD = {
    "grey.JPEG": ["grey"],
    "cmyk.JPEG": ["cmyk"],
    "ycck.JPEG": ["ycck"],
    "really_a_png.JPEG": ["format"],
    "really_a_bmp.JPEG": ["pillow", "format"],
    "really_a_jpeg.png": ["format"],
    "palette.png": ["palette"],
    "clear_palette.png": ["palette", "alpha"],
    "alpha.png": ["alpha"],
    "grey_alpha.png": ["grey", "alpha"],
    "grey16.png": ["grey", "16-bit"],
    "grey16.tif": ["grey", "16-bit", "pillow"],
    "rgb16.png": ["16-bit"],
    "rotated.jpg": ["rotated"],
    "rotated.webp": ["rotated"],
    "lab.tif": ["colour", "pillow"],
    "planes.tif": ["pillow"],
    "turned.tif": ["turned", "pillow"],
    "several.png": ["frames"],
    "phone.jpg": ["frames"],
    "long.png": ["long"],
    "lab_profile.jpg": ["profile"],
    "linear.png": ["profile"],
    "no_end.png": ["pillow"],
}


def test_every_kind_is_told_from_the_header(tmp_path: Path) -> None:
    write_odd(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the broken EXIF
        found = {
            path.name: oddities(path.read_bytes(), path.name, by_pillow="pillow" in ODD.get(path.name, ()))
            for path in tmp_path.iterdir()
        }
    assert {name: [kind for kind, _ in kinds] for name, kinds in found.items() if kinds} == ODD
    assert {kind for kinds in found.values() for kind, _ in kinds} == set(KINDS) - {"large"}
    assert found["rotated.jpg"] == [("rotated", "orientation 6")]
    assert found["phone.jpg"] == [("frames", "MPO, 2 pictures")]
    assert found["linear.png"] == [("profile", "PNG, gamma 1")]
    assert found["long.png"] == [("long", "25 x 1 pixels")]
    assert found["really_a_png.JPEG"] == [("format", "PNG named .JPEG")]


def test_a_large_image_is_told_without_decoding_it() -> None:
    def ppm(side: int) -> bytes:
        return b"P6 %d %d 255\n" % (side, side)

    assert oddities(ppm(9_459), "a.ppm") == []
    assert oddities(ppm(9_460), "a.ppm") == [("large", "9460 x 9460 pixels")]


def profile(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()  # type: ignore[arg-type]


def test_what_pillow_does_not_know_has_no_oddity() -> None:
    assert oddities(b"<html>", "page.jpg") == []
