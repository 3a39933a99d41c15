"""Pillow on one image: why it cannot be read."""

import io

from PIL import Image

from bitfleet.trainer.data.request import Request


def reason_of(request: Request, position: int) -> str | None:
    """Why the image at `position` cannot be read, or is not what the list says; None if Pillow finds no fault."""
    images, sample = request.images, int(request.samples[position])
    height, width = int(images.heights[sample]), int(images.widths[sample])
    try:
        with Image.open(io.BytesIO(request.read(position))) as image:
            image.load()
            if (image.height, image.width) != (height, width):
                return f"it has {image.width} x {image.height} pixels now, and had {width} x {height}"
    except OSError as error:
        return error.strerror or str(error)
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return None
