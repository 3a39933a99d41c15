"""The plans of two ranks, made in one process; tests/distributed/test_checkpoint.py has ranks that
write and read."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from bitfleet.trainer.checkpoint.tensors import ChunkLoadPlanner, ChunkSavePlanner, chunk_of, copy_mark, logical_chunk

NUMEL, SPLIT = 10, 4
FIRST = {"moment": logical_chunk(torch.arange(SPLIT), 0, NUMEL), "weight": torch.ones(2, 3), "count": torch.tensor(7)}
SECOND = {"moment": logical_chunk(torch.arange(SPLIT, NUMEL), SPLIT, NUMEL)}


def plan_of_two_ranks() -> tuple[list[ChunkSavePlanner], list[SavePlan], Metadata]:
    planners = [ChunkSavePlanner(), ChunkSavePlanner()]
    for rank, (planner, tensors) in enumerate(zip(planners, (FIRST, SECOND), strict=True)):
        planner.set_up_planner(tensors, is_coordinator=rank == 0)
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    return planners, plans, metadata


def facts(metadata: Metadata, name: str) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata[name]
    assert isinstance(found, TensorStorageMetadata)
    return found


def test_each_rank_writes_its_own_chunk() -> None:
    planners, plans, metadata = plan_of_two_ranks()
    assert facts(metadata, "moment").size == (NUMEL,)
    assert [(*chunk.offsets, *chunk.sizes) for chunk in facts(metadata, "moment").chunks] == [(0, 4), (4, 6)]
    assert [[item.index.fqn for item in plan.items] for plan in plans] == [["moment", "weight", "count"], ["moment"]]
    for planner, plan, tensors in zip(planners, plans, (FIRST, SECOND), strict=True):
        for item in plan.items:
            assert planner.resolve_data(item) is tensors[item.index.fqn]


def test_tensors_without_a_mark_are_whole() -> None:
    _, _, metadata = plan_of_two_ranks()
    assert facts(metadata, "weight").size == (2, 3)
    assert facts(metadata, "count").size == ()
    assert all(len(facts(metadata, name).chunks) == 1 for name in ("weight", "count"))


@pytest.mark.parametrize(("low", "high"), [(0, 10), (0, 4), (2, 7), (4, 10), (5, 6)])
def test_chunks_are_read_from_whatever_chunks_were_written(low: int, high: int) -> None:
    _, _, metadata = plan_of_two_ranks()
    wanted = logical_chunk(torch.full((high - low,), -1), low, NUMEL)
    planner = ChunkLoadPlanner()
    planner.set_up_planner({"moment": wanted}, metadata)
    for item in planner.create_local_plan().items:
        assert item.storage_index.offset is not None
        written = FIRST if item.storage_index.offset[0] == 0 else SECOND
        part = written["moment"].narrow(0, item.storage_offsets[0], item.lengths[0])
        planner.resolve_tensor(item).copy_(part)
    assert wanted.tolist() == list(range(low, high))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.ones(2)}, "other"),
        ({"weight": torch.ones(3, 2)}, r"weight .*\[2, 3\] .*\[3, 2\]"),
        ({"moment": torch.ones(4)}, r"moment .*\[10\] .*\[4\]"),
        ({"moment": logical_chunk(torch.ones(4), 0, 11)}, r"moment .*\[10\] .*\[11\]"),
    ],
)
def test_what_does_not_fit_is_named(tensors: dict[str, Tensor], message: str) -> None:
    _, _, metadata = plan_of_two_ranks()
    planner = ChunkLoadPlanner()
    planner.set_up_planner(tensors, metadata)
    with pytest.raises(ValueError, match=message):
        planner.create_local_plan()


def test_mark_is_copied() -> None:
    copied: Any = copy_mark(SECOND["moment"], torch.empty(NUMEL - SPLIT))
    assert chunk_of(copied) == (ChunkStorageMetadata(torch.Size([4]), torch.Size([6])), torch.Size([NUMEL]))
    assert chunk_of(copy_mark(FIRST["weight"], torch.empty(2, 3)))[1] == (2, 3)
