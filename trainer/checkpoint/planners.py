"""Chunks of logical tensors, and how torch.distributed.checkpoint (DCP) plans to write and read them.

A logical tensor is flat and lies in chunks on several ranks. A chunk is a plain tensor with a mark that says where it lies. DCP's
own planners take a plain tensor for a whole one: of the ranks that write a name one would win, without an error, and the rest of
the tensor would be lost. torch 2.14 knows marks of its own (CheckpointableTensor), earlier versions none; these planners are used
with every version.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


def logical_chunk(tensor: Tensor, offset: int, numel: int) -> Tensor:
    """Mark a flat tensor as elements `offset`... of a logical one of `numel` elements."""
    tensor.logical_offset, tensor.logical_numel = offset, numel  # type: ignore[attr-defined]
    return tensor


def copy_mark(source: Tensor, target: Tensor) -> Tensor:
    """Mark `target` as the same chunk as `source`, if that is one."""
    if hasattr(source, "logical_numel"):
        mark: Any = source
        return logical_chunk(target, mark.logical_offset, mark.logical_numel)
    return target


def place_of(tensor: Tensor) -> tuple[ChunkStorageMetadata, torch.Size]:
    """Where `tensor` lies in its logical tensor, and the size of that one; a tensor without a mark is whole."""
    if hasattr(tensor, "logical_numel"):
        mark: Any = tensor
        chunk = ChunkStorageMetadata(torch.Size([mark.logical_offset]), tensor.size())
        return chunk, torch.Size([mark.logical_numel])
    return ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size()), tensor.size()


class ChunkSavePlanner(DefaultSavePlanner):
    """Plans to write tensors, whole or as chunks, of a flat dictionary."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """One item for each tensor of this rank."""
        self.plan = SavePlan([_write_item(name, tensor) for name, tensor in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor of that name: a rank has one chunk of each logical tensor."""
        return self.state_dict[index.fqn]


def _write_item(name: str, tensor: Tensor) -> WriteItem:
    chunk, size = place_of(tensor)
    data = TensorWriteData(chunk=chunk, properties=TensorProperties.create_from_tensor(tensor), size=size)
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Plans to fill tensors, whole or chunks, of a flat dictionary, from chunks that any number of ranks wrote."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """Items for each part of a written chunk that a tensor of this rank needs.

        Raises:
            ValueError: the checkpoint has no such tensor, or one of another size. DCP passes it on to all ranks.
        """
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            written = self.metadata.state_dict_metadata.get(name)
            if not isinstance(written, TensorStorageMetadata):
                raise ValueError(f"the checkpoint has no tensor {name}")
            chunk, size = place_of(tensor)
            if written.size != size:
                raise ValueError(f"{name} has size {list(written.size)} in the checkpoint, here {list(size)}")
            items += create_read_items_for_chunk_list(name, written, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor of that name: a rank has one chunk of each logical tensor."""
        tensor: Tensor = self.state_dict[index.fqn]
        return tensor
