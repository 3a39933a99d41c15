"""Looking at checkpoints: contents, differences, and the model alone."""

import contextlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import META, is_checkpoint, latest_checkpoint, read_meta, verify
from bitfleet.trainer.checkpoint.tensors import BITS, MODEL, Tensors


def find(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run there.

    Raises:
        ValueError: there is none.
    """
    if is_checkpoint(path.resolve()) or (path / META).is_file():  # one that was set aside is still looked at
        return path.resolve()
    newest = latest_checkpoint(path)
    if newest is None:
        raise ValueError(f"{path} is neither a checkpoint nor a run folder with one")
    return newest


def inspect(path: Path) -> str:
    """Position, files, tensors and configuration of a checkpoint as text; tensor files are not read through.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    checkpoint = find(path)
    meta = read_meta(checkpoint)
    lines = [
        f"{checkpoint}",
        f"step {meta['step']:,}  epoch {meta['epoch']}  sample offset {meta['sample_offset']:,}  "
        f"skipped steps {meta['skipped_steps']}  written by {meta['world_size']} ranks, {meta['num_replicas']} replicas",
        "",
        f"{'file':60} {'bytes':>14}  sha256",
    ]
    lines += [f"{name:60} {facts['bytes']:14,}  {facts['sha256']}" for name, facts in meta["files"].items()]
    tensors = checkpoint_tensors.contents(checkpoint)
    lines += ["", f"{'tensor':60} {'type':>9} {'elements':>14} {'bytes':>14} chunks"]
    total = 0
    for name, facts in sorted(tensors.items()):
        size = facts.size.numel() * torch.empty(0, dtype=facts.properties.dtype).element_size()
        total += size
        kind = str(facts.properties.dtype).removeprefix("torch.")
        lines.append(f"{name:60} {kind:>9} {facts.size.numel():14,} {size:14,} {len(facts.chunks):6}")
    lines += [f"{'total':60} {'':9} {'':14} {total:14,}", ""]
    for title in ("metrics", "schedules", "versions", "config"):
        lines += [f"{title}:", json.dumps(meta[title], indent=2), ""]
    return "\n".join(lines)


def verified(path: Path) -> str:
    """Read every file of a checkpoint again; one line that says so.

    Raises:
        ValueError: a file is not as it was written.
    """
    checkpoint = find(path)
    meta = verify(checkpoint)
    size = sum(facts["bytes"] for facts in meta["files"].values())
    return f"{checkpoint}: {len(meta['files'])} files, {size:,} bytes, all as they were written (step {meta['step']:,})"


def export_weights(path: Path, out: Path, *, packed: bool) -> str:
    """Write the model alone as safetensors, after verifying the checkpoint; returns one line about it.

    Args:
        path: checkpoint or run folder.
        out: the file to write; its name ends in .safetensors.
        packed: binary weights as bits.<name>, uint8, 8 a byte, least significant bit first, instead of +-1 in fp32; those that
            are not +-1 yet (the rule bnew) as they are.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or the file is not to be written.
    """
    checkpoint = find(path)
    meta = verify(checkpoint)
    tensors = checkpoint_tensors.read(checkpoint, MODEL, BITS)
    state: Tensors = (
        {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}
        if packed
        else checkpoint_tensors.model_state(tensors, meta["model"])
    )
    facts = {
        "model": json.dumps(meta["config"]["model"]),
        "step": str(meta["step"]),
        "shapes": json.dumps(meta["model"]),
    }
    write_safetensors(state, out, facts)
    text = f"{out}: {len(state)} tensors, {out.stat().st_size:,} bytes, of step {meta['step']:,}"
    if meta["config"]["optim"]["rule"] == "bnew" and not any(name.startswith(BITS) for name in tensors):
        text += (
            "; the weights of bnew are not +-1 before they are frozen (optim.frozen_from): they are written as they are"
        )
    return text


def write_safetensors(state: Tensors, out: Path, facts: dict[str, str]) -> None:
    """Write `state` with `facts` as metadata to `out`, which is there whole or not at all.

    Raises:
        ValueError: its name does not end in .safetensors, or it cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ValueError(
            f"the weights are written as safetensors: call the file {out.with_suffix('.safetensors')}, not {out}"
        )
    temporary = out.with_name(out.name + ".tmp")
    try:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, facts)
        temporary.replace(out)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ValueError(f"cannot write {out}: {error}") from error


def first_difference(a: Path, b: Path) -> str | None:
    """The first tensor and element in which two checkpoints differ, in words; None if all tensors have the same bits.

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


def _kind(facts: Any) -> str:
    return f"{list(facts.size)} {str(facts.properties.dtype).removeprefix('torch.')}"


def describe_element(name: str, byte: int, values: list[torch.Tensor], num_bytes: int) -> str:
    """Where two tensors called `name` differ, in words: `values`, flat, in `num_bytes` bytes of which `byte` is the first."""
    index = byte // values[0].element_size()
    one, other = (value[index].item() for value in values)
    if name.startswith(BITS):
        changed = int(one) ^ int(other)
        bit = (changed & -changed).bit_length() - 1
        one, other = (1 if int(value) >> bit & 1 else -1 for value in (one, other))
        index = 8 * index + bit
    return f"{name} differs first at element {index:,}: {one!r} and {other!r} ({num_bytes:,} bytes differ in it)"
