"""Export weights from a flip journal, summarize it, and compare it with the checkpoints."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from bitfleet.launch.checkpoint.tools import describe_element, write_safetensors
from bitfleet.launch.journal.reader import Part, covered, joined, read_parts, replay, weights_after
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import checkpoints, step_of
from bitfleet.trainer.checkpoint.tensors import BITS, unpacked
from bitfleet.trainer.config import read_config, to_dict
from bitfleet.trainer.journal.format import FOLDER, FRAME_BYTES, SIGNS, SKIPPED, Bytes


def export_weights(run: Path, step: int, out: Path, *, packed: bool) -> str:
    """Write the binary weights after `step` as safetensors and return a line about it.

    Args:
        run: run folder.
        step: optimizer steps done; 0: the initial weights.
        out: the file to write, .safetensors.
        packed: as bits.<name>, uint8, 8 per byte, least significant bit first, instead of +-1 in
            fp32.

    Raises:
        ValueError: the journal does not have the step or is damaged, or the file cannot be written.
    """
    bits, shapes = weights_after(run, step)
    state = {
        BITS + name if packed else name: signs if packed else unpacked(signs, shapes[name])
        for name, signs in bits.items()
    }
    model = json.dumps(to_dict(read_config(run))["model"])
    write_safetensors(state, out, {"model": model, "step": str(step), "shapes": json.dumps(shapes)})
    return f"{out}: {len(state)} binary tensors, {out.stat().st_size:,} bytes, of step {step:,}"


def info(run: Path) -> str:
    """Describe a run's journal: parts, steps covered, bytes and flips per step.

    Raises:
        ValueError: there is no journal, or it cannot be read.
    """
    parts = read_parts(run)
    lines = [f"{run / FOLDER}: steps {covered(parts)}", "", f"{'part':>6} {'steps':>23} {'ranks':>6} {'bytes':>16}"]
    for part in parts:
        span = f"{part.begin_step:,} to {part.last_step:,}" if part.files else f"none from {part.begin_step:,} on"
        num_bytes = sum(file.path.stat().st_size for file in part.files)
        lines.append(f"{part.number:6} {span:>23} {len(part.files):6} {num_bytes:16,}")
        lines += [f"       {part.gap}"] if part.gap else []
    flips, sizes, num_skipped, signs_bytes = _by_step(parts)
    num_weights = next(_num_weights(part) for part in parts if part.files)
    lines += ["", f"{num_weights:,} binary weights; {num_skipped:,} steps skipped (a gradient was not finite)"]
    if not flips:
        return "\n".join(lines)
    lines += [
        "",
        f"{'steps':>23} {'flips per step':>14} {'flip ratio':>11} {'bytes per step':>14} {'bits per flip':>13}",
    ]
    for steps in [*_decades(sorted(flips)), sorted(flips)]:
        mean, size = (statistics.fmean(values[step] for step in steps) for values in (flips, sizes))
        title = f"{steps[0]:,} to {steps[-1]:,}"
        cost = f"{8 * size / mean:.2f}" if mean else "-"
        lines.append(f"{title:>23} {mean:14,.1f} {mean / num_weights:11.6f} {size:14,.0f} {cost:>13}")
    lines += ["", f"besides, {signs_bytes:,} bytes of whole signs, from which reading starts"]
    return "\n".join(lines)


def verified(run: Path) -> str:
    """Replay the whole journal and compare it, bit for bit, with every checkpoint.

    Returns:
        One line per checkpoint, and one about the journal.

    Raises:
        ValueError: the journal is damaged, differs from a checkpoint, or covers the step of none.
    """
    parts = read_parts(run)
    saved = {step_of(path): path for path in checkpoints(run)}
    lines: dict[int, str] = {}
    num_steps = 0
    for part in parts:
        if part.gap:
            raise ValueError(f"the flip journal is damaged: {part.gap}")
        wanted = {step for step in saved if part.begin_step <= step <= part.last_step}
        kept: dict[int, list[Bytes]] = defaultdict(list)
        for rank, file in enumerate(part.files):
            for step, signs in replay(file, part.last_step):
                if step in wanted:
                    kept[step][rank:] = [signs.copy()]  # whole signs follow flips
        for step in sorted(wanted):
            _compare(joined([file.layout for file in part.files], kept[step]), saved[step])
            lines[step] = f"{saved[step]}: the same bits"
        num_steps += max(0, part.last_step - part.begin_step)
    if not lines:
        raise ValueError(
            f"nothing to compare: {run} has checkpoints of the steps {sorted(saved)}, the journal covers "
            f"{covered(parts)}"
        )
    for step, path in saved.items():
        lines.setdefault(step, f"{path}: the journal does not have its step")
    return "\n".join(
        [*(lines[step] for step in sorted(lines)), f"every frame of {num_steps:,} steps is as it was written"]
    )


def _compare(bits: dict[str, Tensor], checkpoint: Path) -> None:
    saved = checkpoint_tensors.read(checkpoint, BITS)
    if differing := sorted({name.removeprefix(BITS) for name in saved} ^ bits.keys()):
        raise ValueError(f"{differing[0]} is not in both {checkpoint} and the flip journal")
    for name, signs in bits.items():
        differs = (signs != saved[BITS + name]).nonzero()
        if len(differs):
            where = describe_element(BITS + name, int(differs[0]), [signs, saved[BITS + name]], len(differs))
            raise ValueError(f"the flip journal and {checkpoint} differ: {where}")


def _num_weights(part: Part) -> int:
    return sum(torch.Size(shape).numel() for shape in part.files[0].layout.shapes.values())


def _by_step(parts: list[Part]) -> tuple[dict[int, int], dict[int, int], int, int]:
    """Sum flips and bytes per step, steps skipped, and bytes of whole signs, over all ranks."""
    flips: dict[int, int] = defaultdict(int)
    sizes: dict[int, int] = defaultdict(int)
    num_skipped = signs_bytes = 0
    for part in parts:
        for file in part.files:
            for frame in file.frames:
                if frame.step > part.last_step:
                    break
                if frame.kind == SIGNS:
                    signs_bytes += FRAME_BYTES + frame.length
                    continue
                flips[frame.step] += frame.num_flips
                sizes[frame.step] += FRAME_BYTES + frame.length
                num_skipped += frame.kind == SKIPPED and file.layout.rank == 0
    return flips, sizes, num_skipped, signs_bytes


def _decades(steps: list[int]) -> list[list[int]]:
    """Group steps as 1, 2 to 10, 11 to 100, ...: flips fall by orders of magnitude."""
    groups: dict[int, list[int]] = defaultdict(list)
    for step in steps:
        groups[len(str(max(step - 1, 0))) if step > 1 else 0].append(step)
    return list(groups.values())
