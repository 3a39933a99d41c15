"""The state in a rank's slices, by parameter name: what a checkpoint of a sharded optimizer holds. No communication here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitfleet.optim.buckets import Bucket


def shard(buckets: Sequence[Bucket]) -> dict[str, Tensor]:
    """ "<key>/<parameter>/<first element>" -> flat views into the state of this rank's slices."""
    return {
        f"{key}/{name}/{first}": tensor[low:high]
        for bucket in buckets
        for key, tensor in bucket.state.items()
        for _, name, first, low, high in bucket.pieces()
    }


def steps(buckets: Sequence[Bucket]) -> dict[str, int]:
    """Parameter -> updates that it has had."""
    return {
        segment.name: step for bucket in buckets for segment, step in zip(bucket.segments, bucket.steps, strict=True)
    }


@torch.no_grad()
def load_(buckets: Sequence[Bucket], tensors: dict[str, Tensor], counts: dict[str, int]) -> None:
    """Copy what `shard` and `steps` returned into the slices, and read the weights anew.

    Raises:
        ValueError: the shard is of another layout.
    """
    mine = shard(buckets)
    if mine.keys() != tensors.keys() or steps(buckets).keys() != counts.keys():
        differing = sorted((mine.keys() ^ tensors.keys()) | (steps(buckets).keys() ^ counts.keys()))
        raise ValueError(f"the optimizer shard is of another layout: {differing[0]} is not in both")
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])
    for bucket in buckets:
        bucket.steps = [counts[segment.name] for segment in bucket.segments]
        bucket.read_weights()
