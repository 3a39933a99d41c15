"""tf.image.sample_distorted_bounding_box one window at a time, as its C++ has it, with the whole
image as the object.

After tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc and
tensorflow/core/lib/random/simple_philox.h. float is np.float32 here, double is float.
"""

from typing import Protocol

import numpy as np
from numpy import float32

_WORD = 2**32 - 1


class Random(Protocol):
    """What an attempt draws from."""

    def fraction(self) -> float32:
        """A multiple of 2**-23 in [0, 1); every attempt begins with one."""

    def below(self, limit: int, purpose: str) -> int:
        """An integer in [0, limit) for "height", "y" or "x"."""


class SimplePhilox:
    """TensorFlow's stream for an operation with `seed` and `seed2`: Philox 4x32-10."""

    def __init__(self, seed: int, seed2: int) -> None:
        self._key, self._counter = seed, seed2 << 64
        self._words: list[int] = []

    def fraction(self) -> float32:
        return float32((self._word() & 2**23 - 1) / 2**23)

    def below(self, limit: int, purpose: str) -> int:
        if limit & (limit - 1) == 0:
            return self._word() & (limit - 1)
        word = self._word()
        while word < _WORD % limit + 1:
            word = self._word()
        return word % limit

    def _word(self) -> int:
        if not self._words:
            counter = [self._counter >> shift & _WORD for shift in (0, 32, 64, 96)]
            key = [self._key & _WORD, self._key >> 32]
            for _ in range(10):
                low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
                counter = [high >> 32 ^ counter[1] ^ key[0], high & _WORD, low >> 32 ^ counter[3] ^ key[1], low & _WORD]
                key = [key[0] + 0x9E3779B9 & _WORD, key[1] + 0xBB67AE85 & _WORD]
            self._words, self._counter = counter, self._counter + 1
        return self._words.pop(0)


def sample(height: int, width: int, random: Random) -> tuple[int, int, int, int]:
    """A window (y, x, height, width); the whole image where ten attempts failed."""
    low, high = float32(3 / 4), float32(4 / 3)
    for _ in range(10):
        crop = _generate_random_crop(height, width, random.fraction() * (high - low) + low, random)
        if crop is not None and float32(crop[2] * crop[3]) / float32(height * width) >= float32(0.1):
            return crop
    return 0, 0, height, width


def _generate_random_crop(
    original_height: int, original_width: int, aspect: float32, random: Random
) -> tuple[int, int, int, int] | None:
    min_area = float32(0.08) * float32(original_width) * float32(original_height)
    max_area = float32(1.0) * float32(original_width) * float32(original_height)
    height = int(np.rint(np.sqrt(min_area / aspect)))
    max_height = int(np.rint(np.sqrt(max_area / aspect)))
    if _width(max_height, aspect) > original_width:
        max_height = int((original_width + 0.5 - float(float32(0.0000001))) / float(aspect))
        if _width(max_height, aspect) > original_width:
            max_height -= 1
    max_height = min(max_height, original_height)
    height = min(height, max_height)
    if height < max_height:
        height += random.below(max_height - height + 1, "height")
    if float32(_width(height, aspect) * height) < min_area:
        height += 1
    if float32(_width(height, aspect) * height) > max_area:
        height -= 1
    width = _width(height, aspect)
    area = float32(width * height)
    if area < min_area or area > max_area or width > original_width or height > original_height:
        return None
    if width <= 0 or height <= 0:
        return None
    y = random.below(original_height - height, "y") if height < original_height else 0
    x = random.below(original_width - width, "x") if width < original_width else 0
    return y, x, height, width


def _width(height: int, aspect: float32) -> int:
    return int(np.rint(float32(height) * aspect))
