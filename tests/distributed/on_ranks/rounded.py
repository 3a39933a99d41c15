"""Gradients that travel in bf16, computed on one rank."""

from collections.abc import Sequence

from torch import Tensor


def rounded_sums(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return for each of 2^k ranks the sum as it arrives there: its own part plus the rounded sum
    of its partner.

    Args:
        grads: gradient of each rank, fp32, of one shape.
    """
    sums, distance = list(grads), 1
    while distance < len(sums):
        sums = [own + sums[rank ^ distance].bfloat16().float() for rank, own in enumerate(sums)]
        distance *= 2
    return sums
