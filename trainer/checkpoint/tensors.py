"""Write and read tensors with torch.distributed.checkpoint (DCP) and safetensors: no pickle.

    bits.<parameter>                a binary weight as packed signs, uint8 [ceil(numel / 8)], least
                                    significant bit first; only if it is +-1: not before the first
                                    update with model.initial_weights real, nor before bnew freezes
    model.<tensor>                  any other parameter or buffer, unchanged
    optim.<key>.<parameter>         a moment, flat fp32 [numel]
    diagnostics.<key>.<parameter>   flip memory, packed like the bits; only with metrics.diagnostics

With sharding "bits" each rank writes its slices of bits and moments as chunks of these logical
tensors, and rank 0 the rest; otherwise rank 0 writes everything. Any number of ranks can read them.

A logical tensor is flat and consists of chunks on several ranks. A chunk is a plain tensor with a
mark that says where it belongs. DCP's own planners would take it for a whole tensor: of the ranks
that write one name one would win, without an error, and the rest would be lost. torch 2.14 has
marks (CheckpointableTensor), earlier versions do not; the planners here work with every version.
"""

import json
import os
import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
    _gen_file_name,
)
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from bitfleet.optim import RoutedOptimizer, ShardedOptimizer, is_binary
from bitfleet.optim.diagnostics import BitDiagnostics
from bitfleet.optim.kernels.bits import pack_signs, unpack_signs
from bitfleet.optim.rules.rule import RULES
from bitfleet.optim.sharding.state import BITS as CHUNK_BITS
from bitfleet.optim.sharding.state import Chunk, in_bits
from bitfleet.trainer.ranks.collectives import Ranks

Tensors = dict[str, Tensor]
MODEL, BITS, OPTIM, DIAGNOSTICS = "model.", "bits.", "optim.", "diagnostics."


def shard_files(rank: int) -> str:
    """Return the glob pattern of the files that `rank` writes (DCP's naming)."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def tensors_to_save(
    model: nn.Module, optimizer: Optimizer | None, ranks: Ranks, diagnostics: BitDiagnostics | None = None
) -> Tensors:
    """Collect this rank's share of a checkpoint: views, except for signs packed here.

    Args:
        model: with whole weights on every rank.
        optimizer: None leaves its state out (it is in DeepSpeed's own files).
        ranks: rank and world size.
        diagnostics: of the optimizer, if enabled.
    """
    tensors: Tensors = diagnostics_targets(diagnostics) if diagnostics is not None else {}
    in_chunks: set[str] = set()
    if isinstance(optimizer, ShardedOptimizer):
        tensors |= _marked(optimizer.chunks()) | _marked(optimizer.bit_chunks())
        in_chunks = in_bits(optimizer.buckets)
    if not ranks.is_main:
        return tensors
    binary = {name for name, param in model.named_parameters() if is_binary(param)}
    for name, tensor in model.state_dict().items():
        if name in in_chunks:
            continue
        if name in binary and bool((tensor.detach().abs() == 1).all()):
            tensors[BITS + name] = _packed(tensor)
        else:
            tensors[MODEL + name] = tensor.detach()
    if isinstance(optimizer, RoutedOptimizer):
        tensors |= _plain_state(optimizer)
    return tensors


def _marked(chunks: Iterable[Chunk], prefix: str = OPTIM) -> Tensors:
    return {
        (BITS if chunk.key == CHUNK_BITS else f"{prefix}{chunk.key}.") + chunk.name: logical_chunk(
            chunk.tensor.view(-1), chunk.offset, chunk.numel
        )
        for chunk in chunks
    }


def _plain_state(optimizer: RoutedOptimizer) -> Tensors:
    """Return flat views of the moments of an optimizer that is not sharded."""
    return {
        f"{OPTIM}{key}.{name}": optimizer.state[param][key].view(-1)
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        if param in optimizer.state
        for key in RULES[group["rule"]].state_keys
    }


def _packed(tensor: Tensor) -> Tensor:
    flat = torch.ones(-(-tensor.numel() // 64) * 64, dtype=tensor.dtype, device=tensor.device)
    flat[: tensor.numel()] = tensor.detach().reshape(-1)
    return pack_signs(flat)[: -(-tensor.numel() // 8)]


def unpacked(bits: Tensor, shape: Iterable[int]) -> Tensor:
    """Unpack signs to a +-1 weight, fp32 of `shape`."""
    padded = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.uint8)
    padded[: bits.numel()] = bits
    values = torch.empty(padded.numel() * 8)
    unpack_signs(padded, values)
    size = torch.Size(shape)
    return values[: size.numel()].view(size)


def logical_chunk(tensor: Tensor, offset: int, numel: int) -> Tensor:
    """Mark a flat tensor as the elements from `offset` on of a logical one of `numel` elements."""
    tensor.logical_offset, tensor.logical_numel = offset, numel  # type: ignore[attr-defined]
    return tensor


def copy_mark(source: Tensor, target: Tensor) -> Tensor:
    """Give `target` the mark of `source`, if it has one."""
    if hasattr(source, "logical_numel"):
        mark: Any = source
        return logical_chunk(target, mark.logical_offset, mark.logical_numel)
    return target


def chunk_of(tensor: Tensor) -> tuple[ChunkStorageMetadata, torch.Size]:
    """Return the chunk and the size of its logical tensor; without a mark `tensor` is whole."""
    if hasattr(tensor, "logical_numel"):
        mark: Any = tensor
        chunk = ChunkStorageMetadata(torch.Size([mark.logical_offset]), tensor.size())
        return chunk, torch.Size([mark.logical_numel])
    return ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size()), tensor.size()


class ChunkSavePlanner(DefaultSavePlanner):
    """Plan how to write a flat dictionary of tensors, whole or chunks."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Plan one item per tensor of this rank."""
        self.plan = SavePlan([_write_item(name, tensor) for name, tensor in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the tensor of that name: a rank has one chunk of each logical tensor."""
        return self.state_dict[index.fqn]


def _write_item(name: str, tensor: Tensor) -> WriteItem:
    chunk, size = chunk_of(tensor)
    data = TensorWriteData(chunk=chunk, properties=TensorProperties.create_from_tensor(tensor), size=size)
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class ChunkLoadPlanner(DefaultLoadPlanner):
    """Plan how to fill a flat dictionary of tensors or chunks from those of any number of ranks."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> LoadPlan:
        """Plan an item for each part of a written chunk that a tensor of this rank needs.

        Raises:
            ValueError: the checkpoint lacks a tensor, or has another size. DCP passes it on to all
                ranks.
        """
        assert self.metadata is not None
        items = []
        for name, tensor in self.state_dict.items():
            written = self.metadata.state_dict_metadata.get(name)
            if not isinstance(written, TensorStorageMetadata):
                raise ValueError(f"the checkpoint has no tensor {name}")
            chunk, size = chunk_of(tensor)
            if written.size != size:
                raise ValueError(f"{name} has size {list(written.size)} in the checkpoint, here {list(size)}")
            items += create_read_items_for_chunk_list(name, written, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor of that name: a rank has one chunk of each logical tensor."""
        tensor: Tensor = self.state_dict[index.fqn]
        return tensor


class _Writer(HuggingFaceStorageWriter):
    """DCP's writer, which streams tensors to the file.

    DCP itself serializes the file into memory first, in a call that holds the interpreter lock (0.4
    s for 260 MB): training would stop for as long.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors of `plan` as one safetensors file and flush it."""
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # they would go into an index file, which shards do not have
        if not plan.items:
            return done
        tensors: Tensors = {}
        offsets: dict[str, Any] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), item
            assert item.tensor_data is not None, item
            tensors[item.index.fqn] = tensor.detach().contiguous()
            offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets}
        path = Path(self.path) / _gen_file_name(1, 1, plan.storage_data["shard_index"])
        metadata = {
            CUSTOM_METADATA_KEY: json.dumps(offsets),
            DCP_VERSION_KEY: str(HF_DCP_VERSION),
            FORMAT_KEY: FORMAT_VALUE,
        }
        save_file(tensors, path, metadata)
        path.chmod(0o666 & path.parent.stat().st_mode)  # save_file ignores the umask
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return done


def write(tensors: Tensors, folder: Path, group: Any) -> None:
    """Write every rank's tensors (in host memory) below `folder`; every rank calls this.

    Raises:
        CheckpointException: on all ranks, if one of them fails.
    """
    writer = _Writer(str(folder), save_distributed=True, thread_count=1)
    dcp_save(tensors, storage_writer=writer, planner=ChunkSavePlanner(), process_group=group)


def read_into(tensors: Tensors, folder: Path, group: Any) -> None:
    """Fill `tensors` (chunks or whole tensors) from a checkpoint; every rank calls this."""
    reader = HuggingFaceStorageReader(str(folder))
    dcp_load(tensors, storage_reader=reader, planner=ChunkLoadPlanner(), process_group=group)


def contents(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Read name -> logical size and dtype of every tensor from the headers of a checkpoint's files.

    Raises:
        ValueError: a file is not safetensors.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tensor files in {folder} cannot be read: {error}") from error
    return {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}


def read(folder: Path, *prefixes: str) -> Tensors:
    """Read the whole tensors whose names start with one of `prefixes`, in one process."""
    tensors = empty_tensors(folder, *prefixes)
    _read_alone(tensors, folder)
    return tensors


def empty_tensors(folder: Path, *prefixes: str) -> Tensors:
    """Allocate the whole tensors of a checkpoint whose names start with one of `prefixes`."""
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in contents(folder).items()
        if name.startswith(prefixes)
    }


def read_chunks(chunks: Iterable[Chunk], folder: Path) -> None:
    """Fill chunks in one process, also those of another rank or of another number of ranks."""
    _read_alone(_marked(chunks), folder)


def _read_alone(tensors: Tensors, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        reader = HuggingFaceStorageReader(str(folder))
        dcp_load(tensors, storage_reader=reader, planner=ChunkLoadPlanner(), no_dist=True)


def model_state(tensors: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]]) -> Tensors:
    """Assemble the state_dict of a model from the tensors of a checkpoint.

    Args:
        tensors: all tensors of the model; others are ignored.
        shapes: name -> shape of the model's tensors.
    """
    return {
        name: tensors[MODEL + name] if MODEL + name in tensors else unpacked(tensors[BITS + name].cpu(), shape)
        for name, shape in shapes.items()
    }


def state_targets(optimizer: Optimizer) -> Tensors:
    """Return views into this rank's moments, to be filled; missing state is created as 0."""
    if isinstance(optimizer, ShardedOptimizer):
        return _marked(optimizer.chunks())
    assert isinstance(optimizer, RoutedOptimizer)
    optimizer.create_state()
    return _plain_state(optimizer)


def diagnostics_targets(diagnostics: BitDiagnostics) -> Tensors:
    """Return views of this rank's flip memory, to be saved or filled."""
    return _marked(diagnostics.chunks(), DIAGNOSTICS)


def total_bytes(tensors: Mapping[str, Any], become_bits: Container[str] = ()) -> int:
    """Sum the bytes of `tensors`, with 1 bit per element of the parameters `become_bits`."""
    return sum(
        -(-tensor.numel() // 8)
        if name.startswith(MODEL) and name.removeprefix(MODEL) in become_bits
        else tensor.numel() * tensor.element_size()
        for name, tensor in tensors.items()
    )
