"""Pillow on one image: why it cannot be read."""

import io

from PIL import Image, UnidentifiedImageError

from bitfleet.trainer.data.request import Request


def reason_of(request: Request, position: int) -> str | None:
    """Why the image at `position` cannot be read, or is not what the list says; None if Pillow finds no fault."""
    images, sample = request.images, int(request.samples[position])
    height, width = int(images.heights[sample]), int(images.widths[sample])
    try:
        encoded = request.read(position)
        if not encoded:
            return "the file is empty"
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            if (image.height, image.width) != (height, width):
                return f"it has {image.width} x {image.height} pixels now, and had {width} x {height}"
    except UnidentifiedImageError:  # its text is the address of the buffer
        return "it is not an image"
    except OSError as error:
        return error.strerror or str(error)
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return None
