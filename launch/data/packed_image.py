"""One image made smaller: torchvision's geometry, Pillow's resize, JPEG."""

import io
import warnings

from PIL import Image

from bitfleet.trainer.data.decoding import grey_or_rgb, opened

QUALITY = 90
JPEG_FORMATS = ("JPEG", "MPO")  # MPO: a JPEG with more pictures behind the first, which alone is read


def packed_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width of an image whose short side becomes `short_side`, the long one truncated to whole pixels.

    That is torchvision's Resize; an image that is not larger stays as it is.
    """
    short = min(height, width)
    if short <= short_side:
        return height, width
    return short_side * height // short, short_side * width // short


def packed_image(encoded: bytes, short_side: int) -> tuple[bytes, int, int]:
    """Return a JPEG of the image `encoded` whose short side is `short_side` or less, its height and its width.

    A JPEG that is not larger is returned as it is. Otherwise grey images stay grey and all others become RGB, as the decoder of
    training shows them; the resize is bicubic with antialiasing; EXIF is dropped and not applied.

    Raises:
        ValueError: it does not decode, or Pillow cannot make a JPEG of it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broken EXIF, transparency that is lost, large images
        try:
            with opened(io.BytesIO(encoded)) as image:
                image.load()
                height, width = packed_size(image.height, image.width, short_side)
                if (width, height) == image.size and image.format in JPEG_FORMATS:
                    return encoded, height, width
                small = grey_or_rgb(image)
            if (width, height) != small.size:
                small = small.resize((width, height), Image.Resampling.BICUBIC)
            small.info = {}  # comments would be written, too
            jpeg = io.BytesIO()
            small.save(jpeg, "JPEG", quality=QUALITY)
        except Exception as error:  # broken files raise nearly anything in Pillow
            raise ValueError(str(error) or type(error).__name__) from None
    return jpeg.getvalue(), height, width
