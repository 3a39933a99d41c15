"""Whole images by the decoder of training: does each decode to its last row, and to which size."""

from collections.abc import Sequence
from typing import Any

import numpy as np

BATCH_SIZE = 16  # images whose pixels are in memory together


class WholeDecoder:
    """DALI's CPU decoder on one thread, as trainer/data/dali.py uses it, but for the whole image: no window, no resize."""

    def __init__(self) -> None:
        self._pipeline = _build(BATCH_SIZE)

    def sizes(self, encoded: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """Return height and width, in pixels, of each encoded image; None for one that does not decode.

        Args:
            encoded: At most BATCH_SIZE images.
        """
        if not encoded:
            return []
        try:
            return _run(self._pipeline, encoded)
        except RuntimeError:  # of one image or of all; DALI names at most the first
            sizes = _one_by_one(encoded)
            self._pipeline = _build(BATCH_SIZE)  # DALI: "Current pipeline object is no longer valid"
            return sizes


def _one_by_one(encoded: Sequence[bytes]) -> list[tuple[int, int] | None]:
    sizes: list[tuple[int, int] | None] = []
    pipeline = _build(1)
    for image in encoded:
        try:
            sizes += _run(pipeline, [image])
        except RuntimeError:
            sizes.append(None)
            pipeline = _build(1)  # 2 ms, about as long as decoding a photo
    return sizes


def _run(pipeline: Any, encoded: Sequence[bytes]) -> list[tuple[int, int] | None]:
    (images,) = pipeline.run(encoded=[np.frombuffer(image, np.uint8) for image in encoded])
    return [(height, width) for height, width, _ in images.shape()]


def _build(batch_size: int) -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline
