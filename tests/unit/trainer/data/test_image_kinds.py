"""Images by suffix and by content."""

import io

import pytest
from PIL import Image

from bitfleet.launch.data.whole import WholeDecoder
from bitfleet.trainer.data.image_kinds import HEAD_BYTES, IMAGE_SUFFIXES, is_image, is_of_system, suffix_of

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
    (whole,) = WholeDecoder().decoded([content])
    assert whole.size == ((20, 20) if kind in READ else None)


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
    assert all(map(is_of_system, ("._1.jpg", ".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini")))
    assert not any(map(is_of_system, (".1.jpg", "thumbs.jpg", "_1.jpg")))
