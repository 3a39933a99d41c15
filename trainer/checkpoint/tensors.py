"""The tensors of a checkpoint, on torch.distributed.checkpoint (DCP) with safetensors storage: no pickle, any number of ranks.

    bits.<parameter>            a binary weight as packed signs, uint8 [ceil(numel / 8)], least significant bit first; one that is
                                not +-1 yet (the rule bnew, model.initial_weights real) is not stored so
    model.<tensor>              any other parameter or buffer, as it is
    optim.<key>.<parameter>     a moment, flat fp32 [numel]
    diagnostics.<key>.<parameter>   memory of flips, packed like the bits; only of a run with metrics.diagnostics

With sharding "bits" each rank writes its slices of bits and moments as chunks of these logical tensors, rank 0 the rest; else
rank 0 writes everything. A chunk is a plain view with a mark; trainer/checkpoint/planners.py plans for those. Reading on another
number of ranks is DCP's own resharding.
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
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
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
from bitfleet.trainer.checkpoint.planners import ChunkLoadPlanner, ChunkSavePlanner, logical_chunk
from bitfleet.trainer.ranks.collectives import Ranks

Tensors = dict[str, Tensor]
MODEL, BITS, OPTIM, DIAGNOSTICS = "model.", "bits.", "optim.", "diagnostics."


def shard_files(rank: int) -> str:
    """Pattern of the files that `rank` writes (DCP's naming)."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def tensors_to_save(
    model: nn.Module, optimizer: Optimizer | None, ranks: Ranks, diagnostics: BitDiagnostics | None = None
) -> Tensors:
    """This rank's share of a checkpoint: views where possible, nothing is copied but packed signs.

    Args:
        model: its weights are whole on every rank.
        optimizer: None leaves its state out: it is in DeepSpeed's own files.
        ranks: this process's place.
        diagnostics: of the optimizer, if there are any.
    """
    found: Tensors = diagnostics_targets(diagnostics) if diagnostics is not None else {}
    in_chunks: set[str] = set()
    if isinstance(optimizer, ShardedOptimizer):
        found |= _marked(optimizer.chunks()) | _marked(optimizer.bit_chunks())
        in_chunks = in_bits(optimizer.buckets)
    if not ranks.is_first:
        return found
    binary = {name for name, param in model.named_parameters() if is_binary(param)}
    for name, tensor in model.state_dict().items():
        if name in in_chunks:
            continue
        if name in binary and bool((tensor.detach().abs() == 1).all()):
            found[BITS + name] = _packed(tensor)
        else:
            found[MODEL + name] = tensor.detach()
    if isinstance(optimizer, RoutedOptimizer):
        found |= _plain_state(optimizer)
    return found


def _marked(chunks: Iterable[Chunk], prefix: str = OPTIM) -> Tensors:
    return {
        (BITS if chunk.key == CHUNK_BITS else f"{prefix}{chunk.key}.") + chunk.name: logical_chunk(
            chunk.tensor.view(-1), chunk.offset, chunk.numel
        )
        for chunk in chunks
    }


def _plain_state(optimizer: RoutedOptimizer) -> Tensors:
    """Flat views of the moments of an optimizer that is not sharded."""
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
    """The +-1 weight, fp32 of `shape`, of its packed signs."""
    whole = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.uint8)
    whole[: bits.numel()] = bits
    values = torch.empty(whole.numel() * 8)
    unpack_signs(whole, values)
    size = torch.Size(shape)
    return values[: size.numel()].view(size)


class _Writer(HuggingFaceStorageWriter):
    """DCP's writer, but for how the file of a rank is written.

    DCP serializes the file into memory first, in a call that keeps the interpreter to itself (0.4 s for 260 MB): training would
    stand still as long. This one streams the tensors from where they are.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors of `plan` as one safetensors file, and flush it."""
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # what it would say goes into an index file, which shards of several ranks do not have
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
        path.chmod(0o666 & path.parent.stat().st_mode)  # as the umask says: save_file lets only the owner read
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return done


def write(tensors: Tensors, folder: Path, group: Any) -> None:
    """Write every rank's tensors (in host memory) below `folder`; every rank calls this.

    Raises:
        CheckpointException: on all ranks, when one of them fails.
    """
    writer = _Writer(str(folder), save_distributed=True, thread_count=1)
    dcp_save(tensors, storage_writer=writer, planner=ChunkSavePlanner(), process_group=group)


def read_into(tensors: Tensors, folder: Path, group: Any) -> None:
    """Fill `tensors` (chunks or whole) from a checkpoint; every rank calls this."""
    reader = HuggingFaceStorageReader(str(folder))
    dcp_load(tensors, storage_reader=reader, planner=ChunkLoadPlanner(), process_group=group)


def contents(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name -> logical size and type of every tensor in a checkpoint, from the headers of its files.

    Raises:
        ValueError: a file is not safetensors.
    """
    try:
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tensor files in {folder} cannot be read: {error}") from error
    return {name: facts for name, facts in metadata.items() if isinstance(facts, TensorStorageMetadata)}


def read(folder: Path, *prefixes: str) -> Tensors:
    """The whole tensors whose names begin with one of `prefixes`, in one process."""
    tensors = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in contents(folder).items()
        if name.startswith(prefixes)
    }
    _read_alone(tensors, folder)
    return tensors


def read_chunks(chunks: Iterable[Chunk], folder: Path) -> None:
    """Fill chunks, of this rank or of one of any number of ranks, in one process."""
    _read_alone(_marked(chunks), folder)


def _read_alone(tensors: Tensors, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it need not be there
        reader = HuggingFaceStorageReader(str(folder))
        dcp_load(tensors, storage_reader=reader, planner=ChunkLoadPlanner(), no_dist=True)


def model_state(tensors: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]]) -> Tensors:
    """The state_dict of a model from the tensors of a checkpoint.

    Args:
        tensors: with all of the model's.
        shapes: of the model's tensors.
    """
    return {
        name: tensors[MODEL + name] if MODEL + name in tensors else unpacked(tensors[BITS + name].cpu(), shape)
        for name, shape in shapes.items()
    }


def state_targets(optimizer: Optimizer) -> Tensors:
    """Where the moments of a checkpoint belong on this rank: views into the state, made at 0 where it is new."""
    if isinstance(optimizer, ShardedOptimizer):
        return _marked(optimizer.chunks())
    assert isinstance(optimizer, RoutedOptimizer)
    optimizer.create_state()
    return _plain_state(optimizer)


def diagnostics_targets(diagnostics: BitDiagnostics) -> Tensors:
    """Views of this rank's memory of flips: what is saved, and where it belongs when it is read."""
    return _marked(diagnostics.chunks(), DIAGNOSTICS)


def total_bytes(tensors: Mapping[str, Any], become_bits: Container[str] = ()) -> int:
    """Bytes of all `tensors`; of the parameters `become_bits`, which may hold real values yet, those of their bits."""
    return sum(
        -(-tensor.numel() // 8)
        if name.startswith(MODEL) and name.removeprefix(MODEL) in become_bits
        else tensor.numel() * tensor.element_size()
        for name, tensor in tensors.items()
    )
