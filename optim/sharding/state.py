"""Read and write a rank's slices by parameter name, for checkpoints of a sharded optimizer. No
communication here."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitfleet.optim.sharding.buckets import Bucket

BITS = "bits"


class Chunk(NamedTuple):
    """Part of a logical flat tensor of one parameter, of which every rank holds another part."""

    key: str
    """Key of the state ("exp_avg"), or "bits" for the packed signs of a binary weight (uint8, 8
    weights a byte)."""
    name: str
    """Name of the parameter."""
    tensor: Tensor
    """Flat view of this rank's part."""
    offset: int
    """Index of its first element in the logical tensor."""
    numel: int
    """Elements of the logical tensor: the parameter's, or a byte for 8 of them, the last one filled
    up."""


def chunks(buckets: Sequence[Bucket]) -> list[Chunk]:
    """Return this rank's chunks of the state of every parameter."""
    found = []
    for bucket in buckets:
        for index, name, first, low, high in bucket.pieces():
            numel = bucket.segments[index].param.numel()
            found += [Chunk(key, name, state[low:high], first, numel) for key, state in bucket.state.items()]
    return found


def bit_chunks(buckets: Sequence[Bucket]) -> list[Chunk]:
    """Return this rank's chunks of the binary weights that are +-1, as packed signs."""
    names = in_bits(buckets)
    found = (chunk for bucket in buckets if bucket.binary for chunk in packed_chunks(bucket, BITS, bucket.signs()))
    return [chunk for chunk in found if chunk.name in names]


def in_bits(buckets: Sequence[Bucket]) -> set[str]:
    """Return the parameters that `bit_chunks` holds; weights that start as real values are in it
    after their first update."""
    return {
        segment.name
        for bucket in buckets
        if bucket.binary
        for index, segment in enumerate(bucket.segments)
        if index not in bucket.real
    }


def packed_chunks(bucket: Bucket, key: str, packed: Tensor) -> list[Chunk]:
    """Return the chunks, by parameter, of a tensor that holds a bit per weight of a slice: uint8
    [slice_numel / 8]."""
    return [
        Chunk(key, name, packed[low // 8 : -(-high // 8)], first // 8, -(-bucket.segments[i].param.numel() // 8))
        for i, name, first, low, high in bucket.pieces()
    ]


def steps(buckets: Sequence[Bucket]) -> dict[str, int]:
    """Parameter -> updates that it has had."""
    return {
        segment.name: step for bucket in buckets for segment, step in zip(bucket.segments, bucket.steps, strict=True)
    }


def load_steps_(buckets: Sequence[Bucket], counts: dict[str, int]) -> None:
    """Set the counts that `steps` returned, and read the weights again.

    Raises:
        ValueError: they are of other parameters.
    """
    if differing := sorted(steps(buckets).keys() ^ counts.keys()):
        raise ValueError(f"the optimizer state is of other parameters: {differing[0]} is not in both")
    for bucket in buckets:
        bucket.steps = [counts[segment.name] for segment in bucket.segments]
        bucket.read_weights()


def shard(buckets: Sequence[Bucket]) -> dict[str, Tensor]:
    """ "<key>/<parameter>/<first element>" -> flat views into the state of this rank's slices."""
    return {f"{chunk.key}/{chunk.name}/{chunk.offset}": chunk.tensor for chunk in chunks(buckets)}


@torch.no_grad()
def load_(buckets: Sequence[Bucket], tensors: dict[str, Tensor], counts: dict[str, int]) -> None:
    """Copy what `shard` and `steps` returned into the slices, and read the weights again.

    Raises:
        ValueError: the shard is of another layout.
    """
    mine = shard(buckets)
    if differing := sorted(mine.keys() ^ tensors.keys()):
        raise ValueError(f"the optimizer shard is of another layout: {differing[0]} is not in both")
    for name, tensor in mine.items():
        if len(tensors[name]) != len(tensor):
            raise ValueError(
                f"the optimizer shard is of another layout: {name} has {len(tensors[name]):,} elements there and "
                f"{len(tensor):,} here"
            )
    load_steps_(buckets, counts)
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])


def nonfinite(buckets: Sequence[Bucket], grads: Sequence[Tensor]) -> list[str]:
    """Parameters of which this rank's slice of the reduced gradient is not finite."""
    return [
        name
        for bucket, grad in zip(buckets, grads, strict=True)
        for _, name, _, low, high in bucket.pieces()
        if not grad[low:high].isfinite().all()
    ]
