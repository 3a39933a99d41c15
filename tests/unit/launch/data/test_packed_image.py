"""One packed image: its size, its pixels, and what becomes of odd ones."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from bitfleet.launch.data.packed_image import packed_image, packed_size
from tests.unit.launch.data.test_oddities import become_ycck, sixteen_bit_rgb_png
from tests.unit.trainer.data.test_images import photo


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (333, 499), (256, 2000), (900, 257), (257, 257)])
def test_sizes_are_those_of_torchvision(size: tuple[int, int]) -> None:
    resized = functional.resize(Image.new("L", size[::-1]), 256)
    assert packed_size(*size, 256) == (resized.height, resized.width)


@pytest.mark.parametrize("size", [(256, 300), (255, 300), (3, 5000), (1, 1)])
def test_what_is_not_larger_keeps_its_size(size: tuple[int, int]) -> None:
    assert packed_size(*size, 256) == size


class Odd(NamedTuple):
    name: str
    mode: str
    save: Callable[[Image.Image, Path], None]
    """Save a photo."""
    look: Callable[[Image.Image], Image.Image]
    """What the packed photo should look like."""


def as_grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def save_grey16(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def save_rotated(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def save_ycck(image: Image.Image, path: Path) -> None:
    image.convert("CMYK").save(path, quality=98)
    become_ycck(path)


def far_apart(packed: Image.Image, reference: Image.Image) -> float:
    """How far two images differ, seen from some distance: JPEG loses detail, most of all of colours."""
    return float(np.abs(np.asarray(packed.reduce(4)).astype(int) - np.asarray(reference.reduce(4))).mean())


ODD = [
    Odd("grey.JPEG", "L", lambda image, path: as_grey(image).save(path), as_grey),
    Odd("grey.png", "L", lambda image, path: as_grey(image).save(path), as_grey),
    Odd("grey_alpha.png", "L", lambda image, path: image.convert("LA").save(path), as_grey),
    Odd("grey16.png", "L", save_grey16, as_grey),
    Odd("grey16.tif", "L", save_grey16, as_grey),
    Odd("bilevel.png", "L", lambda image, path: image.convert("1").save(path), lambda image: image.convert("1")),
    Odd("cmyk.JPEG", "RGB", lambda image, path: image.convert("CMYK").save(path), lambda image: image),
    Odd("png.JPEG", "RGB", lambda image, path: image.save(path, "PNG"), lambda image: image),
    Odd("alpha.png", "RGB", lambda image, path: image.convert("RGBA").save(path), lambda image: image),
    Odd("palette.png", "RGB", lambda image, path: image.convert("P").save(path), lambda image: image.convert("P")),
    Odd("rotated.JPEG", "RGB", save_rotated, lambda image: image),
    Odd("image.webp", "RGB", lambda image, path: image.save(path, lossless=True), lambda image: image),
]


@pytest.mark.parametrize("short_side", [60, 90, 100])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_odd_images_become_what_training_sees(tmp_path: Path, odd: Odd, short_side: int) -> None:
    path, image = tmp_path / odd.name, photo(90, 120)
    odd.save(image, path)
    encoded = path.read_bytes()
    jpeg, height, width = packed_image(encoded, short_side)
    if short_side >= 90 and "JPEG" in odd.name and odd.name != "png.JPEG":
        assert jpeg == encoded
        return
    with Image.open(io.BytesIO(jpeg)) as packed:
        assert (packed.format, packed.mode) == ("JPEG", odd.mode)
        assert (packed.height, packed.width) == (height, width) == ((60, 80) if short_side == 60 else (90, 120))
        assert 0x0112 not in packed.getexif()
        reference = odd.look(image).convert(odd.mode).resize((width, height), Image.Resampling.BICUBIC)
        assert far_apart(packed, reference) < 3


def test_sixteen_bit_colour_and_ycck(tmp_path: Path) -> None:
    sixteen_bit_rgb_png(tmp_path / "16.png")
    jpeg, _, _ = packed_image((tmp_path / "16.png").read_bytes(), 32)
    with Image.open(io.BytesIO(jpeg)) as packed:
        assert (packed.mode, packed.size) == ("RGB", (32, 35))
    save_ycck(photo(90, 120), tmp_path / "ycck.jpg")
    with Image.open(tmp_path / "ycck.jpg") as image:
        reference = image.convert("RGB").resize((80, 60), Image.Resampling.BICUBIC)
    jpeg, _, _ = packed_image((tmp_path / "ycck.jpg").read_bytes(), 60)
    with Image.open(io.BytesIO(jpeg)) as packed:
        assert packed.mode == "RGB"
        assert far_apart(packed, reference) < 3


def test_a_range_of_brightness_that_is_not_known_is_refused() -> None:
    tiff = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)).save(tiff, "TIFF")
    with pytest.raises(ValueError, match="mode F: its range of brightness is not known"):
        packed_image(tiff.getvalue(), 32)
