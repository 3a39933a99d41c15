"""Image files by suffix and content, and their pixels by Pillow."""

import io
import struct
import warnings
from pathlib import Path

import pytest
from PIL import Image

from bitfleet.launch.data.verify import WholeDecoder
from bitfleet.trainer.data import decoding
from bitfleet.trainer.data.decoding import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    decode,
    header_size,
    is_image,
    is_system_file,
    opened,
    suffix_of,
)
from tests.unit.trainer.data.test_images import photo


def test_one_limit_for_large_images(tmp_path: Path) -> None:
    """Pillow warns from 89 million pixels on and has an error from 179 million on; here there is
    one limit, and no warning."""
    path = tmp_path / "large.png"
    warnings.simplefilter("error")
    Image.new("1", (13_377, 13_377)).save(path)
    assert header_size(str(path)) == (13_377, 13_377)
    Image.new("1", (13_378, 13_378)).save(path)
    reason = r"^it has 13378 x 13378 = 178,970,884 pixels, and at most 178,956,970 are read: make it smaller$"
    with pytest.raises(ValueError, match=reason):
        header_size(str(path))
    with pytest.raises(ValueError, match=reason):
        decode(path.read_bytes())


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_none(size: tuple[int, int], tmp_path: Path) -> None:
    header = struct.pack("<IiiHHIIiiII", 40, *size, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "none.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    (tmp_path / "none.ppm").write_bytes(b"P6 %d %d 255\n" % size)
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="not an image"):
            header_size(str(path))


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "^the file is empty$"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "^it is not an image$"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "^it is not an image$"),
    ],
)
def test_what_is_not_an_image(encoded: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(encoded)


@pytest.mark.parametrize("form", ["GIF", "TGA", "ICO"])
def test_other_formats_are_refused_by_name(form: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    photo(32, 32).save(path, form)
    for read in (lambda: decode(path.read_bytes()), lambda: header_size(str(path))):
        with pytest.raises(ValueError, match=f" {form} file"):
            read()


@pytest.mark.parametrize(("form", "share"), [("JPEG", 0.6), ("PNG", 0.6), ("TIFF", 0.6), ("WEBP", 0.6), ("JPEG", 0.01)])
def test_half_an_image_is_none(form: str, share: float) -> None:
    file = io.BytesIO()
    photo(80, 90).save(file, form)
    encoded = file.getvalue()
    with pytest.raises(ValueError, match="."):
        decode(encoded[: int(share * len(encoded))])


def test_what_pillow_raises_is_one_kind_of_error(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    photo(8, 9).save(file, "PNG")
    for error in (struct.error("short"), KeyError("x"), IndexError("y"), SyntaxError("z")):
        monkeypatch.setattr(decoding, "grey_or_rgb", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ValueError, match="."):
            decode(file.getvalue())
    monkeypatch.setattr(decoding, "grey_or_rgb", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        decode(file.getvalue())


def test_opening_reads_the_header_alone(tmp_path: Path) -> None:
    photo(80, 90).save(tmp_path / "a.jpg")
    encoded = (tmp_path / "a.jpg").read_bytes()
    with opened(io.BytesIO(encoded[:700])) as image:
        assert image.size == (90, 80)


READ = ["JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "J2K", "BigTIFF", "P5", "P4"]
NOT_READ = ["GIF", "DIB", "ICO", "TGA", "PCX", "SGI", "PFM"]
SPECIAL = {
    "J2K": ("JPEG2000", "RGB", {"no_jp2": True}),
    "BigTIFF": ("TIFF", "RGB", {"big_tiff": True}),
    "P5": ("PPM", "L", {}),
    "P4": ("PPM", "1", {}),
    "PFM": ("PPM", "F", {}),
}


def encoded(kind: str) -> bytes:
    form, mode, options = SPECIAL.get(kind, (kind, "RGB", {}))
    file = io.BytesIO()
    Image.new(mode, (20, 20)).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", READ + NOT_READ)
def test_content_is_an_image_where_the_decoder_reads_it(kind: str) -> None:
    content = encoded(kind)
    assert is_image(content[:HEAD_BYTES]) == (kind in READ)
    (decoded,) = WholeDecoder().decoded([content])
    assert decoded.shape == ((20, 20) if kind in READ else None)


@pytest.mark.parametrize("text", [b"P2 2\n2", b"P3\n# made by hand\n2 2", b"P1\t2 2"])
def test_plain_text_pixmaps(text: bytes) -> None:
    assert is_image(text)


@pytest.mark.parametrize(
    "text", [b"", b"BMW and others drove by, 100 times", b"P1 is a road", b"MM", b"II*", b"RIFF....WAVE"]
)
def test_what_begins_like_an_image(text: bytes) -> None:
    assert not is_image(text)


def test_suffixes() -> None:
    assert [suffix_of(name) for name in ("a.b.JPG", "photo", ".jpg", "a.", "é.PnG")] == [".jpg", "", "", ".", ".png"]
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
    assert all(map(is_system_file, ("._1.jpg", ".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini")))
    assert not any(map(is_system_file, (".1.jpg", "thumbs.jpg", "_1.jpg")))
