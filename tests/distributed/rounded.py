"""What halving makes of gradients that travel in bf16, on one rank."""

from collections.abc import Sequence

from torch import Tensor


def rounded_sums(grads: Sequence[Tensor]) -> list[Tensor]:
    """For each of 2^k ranks the sum as it arrives there: what a rank holds plus the rounded sum of its partner.

    Args:
        grads: of each rank, fp32, of one shape.
    """
    sums, distance = list(grads), 1
    while distance < len(sums):
        sums = [each + sums[rank ^ distance].bfloat16().float() for rank, each in enumerate(sums)]
        distance *= 2
    return sums
