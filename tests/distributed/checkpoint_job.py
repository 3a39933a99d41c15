"""Runs on every rank: chunks of logical tensors go to files and come back, to the ranks that wrote
them and to others."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.tensors import Tensors, logical_chunk

NUMEL = 1001
WHOLE = {
    "optim.exp_avg.w": torch.randn(NUMEL, generator=torch.Generator().manual_seed(1)),
    "bits.w": torch.randint(0, 256, (NUMEL,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)),
}
ON_FIRST = {"model.bias": torch.linspace(0, 1, 6).view(2, 3), "model.num_batches_tracked": torch.tensor(7)}
"""Whole tensors, which rank 0 alone writes."""


def chunks_of(rank: int, world_size: int) -> Tensors:
    """Rank `rank`'s chunks of WHOLE, of unequal sizes."""
    low, high = (NUMEL * place**2 // world_size**2 for place in (rank, rank + 1))
    return {name: logical_chunk(whole[low:high].clone(), low, NUMEL) for name, whole in WHOLE.items()}


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def main() -> None:
    dist.init_process_group("gloo")
    rank, world_size, folder = dist.get_rank(), dist.get_world_size(), Path(sys.argv[1])
    mine = chunks_of(rank, world_size) | (ON_FIRST if rank == 0 else {})
    checkpoint_tensors.write(mine, folder, dist.group.WORLD)
    (file,) = folder.glob(checkpoint_tensors.shard_files(rank))
    assert_equal(load_file(file), mine)

    for owner in (rank, world_size - 1 - rank):
        wanted = chunks_of(owner, world_size)
        for tensor in wanted.values():
            tensor.zero_()
        checkpoint_tensors.read_into(wanted, folder, dist.group.WORLD)
        assert_equal(wanted, chunks_of(owner, world_size))
    assert_equal(checkpoint_tensors.read(folder, ""), WHOLE | ON_FIRST)
    dist.barrier()
    dist.destroy_process_group()
    print("rank passed", flush=True)
    os._exit(0)  # gloo's destructors abort a process now and then, also after its group is destroyed


if __name__ == "__main__":
    main()
