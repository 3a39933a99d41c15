"""Compare the weights of the ranks of a sharded optimizer, and name what is wrong."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from bitfleet.optim.sharding.buckets import Bucket
from bitfleet.optim.sharding.reduction import all_gather_single


class WeightsDiffer(RuntimeError):
    """Raised when the ranks do not hold the same weights."""


@torch.no_grad()
def differing_weights(buckets: Sequence[Bucket], process_group: dist.ProcessGroup | None) -> list[str]:
    """Compare a checksum of every bucket over the ranks, and look closer at those that differ;
    every rank calls this.

    Returns:
        "rank 1: fc.weight from element 345", a text for each rank and parameter that is wrong; the
        same on every rank.
    """
    world_size = dist.get_world_size(process_group)
    sums = torch.stack([bucket.checksum() for bucket in buckets])
    everyone = torch.empty(world_size * len(sums), dtype=torch.int64, device=sums.device)
    all_gather_single(everyone, sums, group=process_group)
    checksums = everyone.view(world_size, -1).T.tolist()
    differing = [(bucket, each) for bucket, each in zip(buckets, checksums, strict=True) if len(set(each)) > 1]
    if not differing:
        return []
    mine = [difference for bucket, each in differing for difference in _wrong_here(bucket, each, process_group)]
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, mine, group=process_group)
    return [f"rank {rank}: {name} from element {i}" for rank, each in enumerate(found) for name, i in each]


def union(names: list[str], process_group: dist.ProcessGroup | None) -> list[str]:
    """Return the names of all ranks, each once, in order of rank; every rank calls this."""
    if not dist.is_initialized():
        return names
    found: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(found, names, group=process_group)
    return list(dict.fromkeys(name for each in found for name in each))


def _wrong_here(bucket: Bucket, checksums: list[int], process_group: dist.ProcessGroup | None) -> list[tuple[str, int]]:
    """Return the parameters of `bucket` that are wrong on this rank, each with its first wrong
    element."""
    truth = bucket.wire_form()
    if bucket.travels_as_bits:  # the owners have the truth in their packed slices
        all_gather_single(truth, bucket.signs(), group=process_group)
    else:  # what most ranks have; of two, rank 0
        majority = max(range(len(checksums)), key=lambda rank: (checksums.count(checksums[rank]), -rank))
        dist.broadcast(truth.view(torch.uint8), group_src=majority, group=process_group)
    return bucket.differences(truth)
