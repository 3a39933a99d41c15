"""Buffers that share memory do not change results."""

import numpy as np
import pytest

from bitfleet.packed.program import Buffer, Kind, Operation, Program, Type, to_bytes
from bitfleet.packed.runner import PackedNetwork
from tests.unit.models.packed.reference import run

TOLERANCE = 1e-5


@pytest.mark.parametrize("channels", [3, 130])
def test_sums_may_be_written_over_what_they_add(channels: int) -> None:
    generator = np.random.default_rng(0)
    image, floats, added = (Buffer(4, 5, channels) for _ in range(3))
    signs, sums = Buffer(4, 5, channels, Type.SIGNS), Buffer(4, 5, channels, Type.SUMS)
    mean, weight = Buffer(1, 1, channels), generator.random((channels, 1, channels)) > 0.5
    factor, ones = generator.standard_normal(channels).astype(np.float32), np.ones(channels, np.float32)
    operations = [
        Operation(Kind.NORMALIZE, image, floats, factor=100 * ones, offset=100 * ones, signs=signs),
        Operation(Kind.BINARY_CONV, signs, sums, weight=weight),
        Operation(Kind.AFFINE, sums, added, other=floats, factor=factor),
        Operation(Kind.MEAN, added, mean),
    ]
    pixels = generator.integers(0, 256, (4, 5, channels), np.uint8)
    expected = run(operations, pixels).logits
    (found,) = PackedNetwork(to_bytes(Program(operations, {})), {})(pixels[None])
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
