"""The PNG without compression."""

import io

import numpy as np
import pytest
from PIL import Image

from bitfleet.launch.data import verify
from bitfleet.trainer.data.dali import plain_png


@pytest.mark.parametrize("shape", [(1, 1), (40, 36), (3, 700), (300, 300)])
def test_pillow_and_dali_read_the_pixels(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    encoded = plain_png(pixels)
    assert pixels.nbytes < len(encoded) < 1.01 * pixels.nbytes + 100 + shape[0]
    with Image.open(io.BytesIO(encoded)) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)
    (ours,) = verify._build(1).run(encoded=[np.frombuffer(encoded, np.uint8)])
    np.testing.assert_array_equal(ours.as_array()[0], pixels)
