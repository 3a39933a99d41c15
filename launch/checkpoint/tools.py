"""Inspect checkpoints, compare them, and export the model alone."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import META, absolute, is_checkpoint, latest_checkpoint, read_meta, verify
from bitfleet.trainer.checkpoint.tensors import BITS, MODEL, Tensors
from bitfleet.trainer.run.files import written_atomically


def find(path: Path) -> Path:
    """Return the checkpoint at `path`, or the newest one of the run there.

    Raises:
        ValueError: there is no checkpoint.
    """
    if is_checkpoint(absolute(path)):
        return absolute(path)
    if is_checkpoint(path.resolve()) or (path / META).is_file():  # also a renamed one
        return path.resolve()
    newest = latest_checkpoint(path)
    if newest is None:
        raise ValueError(f"{path} is neither a checkpoint nor a run folder with one")
    return newest


def inspect(path: Path) -> str:
    """Describe position, files, tensors and configuration of a checkpoint, without verifying it.

    Raises:
        ValueError: there is no checkpoint, or it cannot be read.
    """
    checkpoint = find(path)
    meta = read_meta(checkpoint)
    lines = [
        f"{checkpoint}",
        f"step {meta['step']:,}  epoch {meta['epoch']}  sample offset {meta['sample_offset']:,}  skipped steps "
        f"{meta['skipped_steps']}  written by {meta['world_size']} ranks, {meta['num_replicas']} replicas",
        "",
        f"{'file':60} {'bytes':>14}  sha256",
    ]
    lines += [f"{name:60} {file['bytes']:14,}  {file['sha256']}" for name, file in meta["files"].items()]
    tensors = checkpoint_tensors.contents(checkpoint)
    lines += ["", f"{'tensor':60} {'type':>9} {'elements':>14} {'bytes':>14} chunks"]
    total = 0
    for name, tensor in sorted(tensors.items()):
        dtype = tensor.properties.dtype
        numel, size = tensor.size.numel(), tensor.size.numel() * dtype.itemsize
        total += size
        lines.append(f"{name:60} {_name(dtype):>9} {numel:14,} {size:14,} {len(tensor.chunks):6}")
    lines += [f"{'total':60} {'':9} {'':14} {total:14,}", ""]
    for title in ("metrics", "schedules", "versions", "config"):
        lines += [f"{title}:", json.dumps(meta[title], indent=2), ""]
    return "\n".join(lines)


def verified(path: Path) -> str:
    """Read every file of a checkpoint, compare it with its hash, and return a line about it.

    Raises:
        ValueError: a file has changed since it was written.
    """
    checkpoint = find(path)
    meta = verify(checkpoint)
    size = sum(file["bytes"] for file in meta["files"].values())
    return f"{checkpoint}: {len(meta['files'])} files, {size:,} bytes, all as they were written (step {meta['step']:,})"


def export_weights(path: Path, out: Path, *, packed: bool) -> str:
    """Verify a checkpoint, write only its model as safetensors, and return a line about it.

    Args:
        path: checkpoint or run folder.
        out: the file to write, .safetensors.
        packed: binary weights as bits.<name>, uint8, 8 per byte, least significant bit first,
            instead of +-1 in fp32; any that are not +-1 (the rules bnew and real_adam) stay real.

    Raises:
        ValueError: the checkpoint does not exist or is damaged, or the file cannot be written.
    """
    checkpoint = find(path)
    meta = verify(checkpoint)
    tensors = checkpoint_tensors.read(checkpoint, MODEL, BITS)
    state: Tensors = (
        {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}
        if packed
        else checkpoint_tensors.model_state(tensors, meta["model"])
    )
    model, shapes = json.dumps(meta["config"]["model"]), json.dumps(meta["model"])
    write_safetensors(state, out, {"model": model, "step": str(meta["step"]), "shapes": shapes})
    text = f"{out}: {len(state)} tensors, {out.stat().st_size:,} bytes, of step {meta['step']:,}"
    if meta["config"]["optim"]["rule"] == "bnew" and not any(name.startswith(BITS) for name in tensors):
        text += "; the weights of bnew are real until they are frozen (optim.frozen_from) and were written as they are"
    return text


def write_safetensors(state: Tensors, out: Path, metadata: dict[str, str]) -> None:
    """Write `state` and `metadata` to `out` atomically.

    Raises:
        ValueError: its name does not end in .safetensors, or it cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ValueError(
            f"weights are written as safetensors: name the file {out.with_suffix('.safetensors')}, not {out}"
        )
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        with written_atomically(out) as temporary:
            try:
                safetensors.torch.save_file(contiguous, temporary, metadata)
            except safetensors.SafetensorError:
                temporary.unlink(missing_ok=True)
                raise
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot write {out}: {error}") from error


def first_difference(a: Path, b: Path) -> str | None:
    """Describe the first element in which two checkpoints differ; None if all bits are equal.

    Raises:
        ValueError: one of them cannot be read.
    """
    paths = find(a), find(b)
    here, there = (checkpoint_tensors.contents(path) for path in paths)
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there:
            return f"{name} is only in {paths[0] if name in here else paths[1]}"
        if here[name].size != there[name].size or here[name].properties.dtype != there[name].properties.dtype:
            return f"{name} is {_kind(here[name])} in {paths[0]} and {_kind(there[name])} in {paths[1]}"
        values = [checkpoint_tensors.read(path, name)[name].reshape(-1) for path in paths]
        differs = (values[0].view(torch.uint8) != values[1].view(torch.uint8)).nonzero()
        if len(differs):
            return describe_element(name, int(differs[0]), values, len(differs))
    return None


def _kind(tensor: Any) -> str:
    return f"{list(tensor.size)} {_name(tensor.properties.dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_element(name: str, byte: int, values: list[torch.Tensor], num_bytes: int) -> str:
    """Describe the first of `num_bytes` differing bytes, at `byte`, of two flat tensors."""
    index = byte // values[0].element_size()
    one, other = (value[index].item() for value in values)
    if name.startswith(BITS):
        changed = int(one) ^ int(other)
        bit = (changed & -changed).bit_length() - 1
        one, other = (1 if int(value) >> bit & 1 else -1 for value in (one, other))
        index = 8 * index + bit
    return f"{name} differs first at element {index:,}: {one!r} and {other!r} ({num_bytes:,} bytes differ in it)"
