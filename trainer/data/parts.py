"""Batches in parts: so many whole images that their pixels take a bounded memory, however large single ones are."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from bitfleet.trainer.data.request import Decoded, Request
from bitfleet.trainer.data.sampler import Ints, Windows

MOST_BYTES = 1 << 28
"""Of the pixels that are decoded together; a single image may have more."""


def in_parts(requests: Iterable[Request]) -> Iterator[Request]:
    """Yield each request, cut into several where its images, whole, have more than MOST_BYTES."""
    for request in requests:
        images, samples = request.images, request.samples
        parts = slices_of(3 * images.heights[samples].astype(np.int64) * images.widths[samples])
        for part in parts[:-1]:
            yield request.part(part)._replace(ends_batch=False)
        yield request.part(parts[-1]) if len(parts) > 1 else request


def slices_of(sizes: Ints, most_items: int | None = None) -> list[slice]:
    """Cut a sequence into runs of at most MOST_BYTES and `most_items`; at least one slice, and one item in each.

    Args:
        sizes: Bytes of each item [N].
        most_items: None for any number.
    """
    if int(sizes.sum()) <= MOST_BYTES and most_items is None:
        return [slice(0, len(sizes))]
    starts, total = [0], 0
    for index, size in enumerate(sizes.tolist()):
        total += size
        if index > starts[-1] and (total > MOST_BYTES or index - starts[-1] == most_items):
            starts.append(index)
            total = size
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def whole_batches(decoded: Iterable[Decoded]) -> Iterator[Decoded]:
    """Put the parts of each batch together again: what `in_parts` cut, decoded."""
    parts: list[Decoded] = []
    for part in decoded:
        parts.append(part)
        if part[1].ends_batch:
            yield _joined(parts) if len(parts) > 1 else part
            parts = []
    assert not parts, "a batch has no last part"


def _joined(parts: list[Decoded]) -> Decoded:
    images: list[torch.Tensor] = [image for part, _ in parts for image in part]
    requests = [request for _, request in parts]
    starts, ends = (np.concatenate([request.windows[corner] for request in requests]) for corner in (0, 1))
    samples = np.concatenate([request.samples for request in requests])
    flips = np.concatenate([request.flips for request in requests])
    return images, Request(requests[0].images, samples, Windows(starts, ends), flips, requests[0].epoch)
