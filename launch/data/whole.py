"""Whole images by the decoders of training: does each decode to its last row, and to which size."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bitfleet.trainer.data.dali_graph import FIRST_BYTES
from bitfleet.trainer.data.decoding import decode

BATCH_SIZE = 16  # images whose pixels are in memory together


class Whole(NamedTuple):
    """What became of an encoded image."""

    size: tuple[int, int] | None
    """Height and width, in pixels; None if it does not decode."""
    reason: str = ""
    """Why it does not."""
    by_pillow: bool = False
    """Pillow decoded it, as in training: DALI does not read it, or not as Pillow does."""


class WholeDecoder:
    """DALI's CPU decoder on one thread, as dali.py uses it, but for the whole image: no window, no resize. Else Pillow."""

    def __init__(self) -> None:
        self._pipeline = _build(BATCH_SIZE)

    def decoded(self, encoded: Sequence[bytes]) -> list[Whole]:
        """Decode at most BATCH_SIZE images."""
        for_dali = [index for index, image in enumerate(encoded) if image[:1] and image[0] in FIRST_BYTES]
        with _no_lines_of_dali():
            sizes = self._sizes([encoded[index] for index in for_dali])
        found = {index: Whole(size) for index, size in zip(for_dali, sizes, strict=True) if size is not None}
        return [found[index] if index in found else _by_pillow(image) for index, image in enumerate(encoded)]

    def _sizes(self, encoded: Sequence[bytes]) -> list[tuple[int, int] | None]:
        if not encoded:
            return []
        try:
            return _run(self._pipeline, encoded)
        except RuntimeError:  # of one image or of all; DALI names at most the first
            sizes = _one_by_one(encoded)
            self._pipeline = _build(BATCH_SIZE)  # DALI: "Current pipeline object is no longer valid"
            return sizes


def _by_pillow(encoded: bytes) -> Whole:
    try:
        image = decode(encoded)
    except ValueError as error:
        return Whole(None, str(error))
    return Whole((image.height, image.width), by_pillow=True)


@contextlib.contextmanager
def _no_lines_of_dali() -> Iterator[None]:
    """Keep from stderr what DALI's decoders print of images that they cannot read: each is in the report, or Pillow reads it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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
