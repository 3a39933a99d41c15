"""Read the flip journal: which steps it covers, and the binary weights after any of them."""

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitfleet.trainer.journal.format import (
    FOLDER,
    FRAME_BYTES,
    SIGNS,
    Bytes,
    Frame,
    Layout,
    apply_,
    parse_frame,
    read_header,
)

NO_END = 2**63
NAME = re.compile(r"part-(\d{4,})-step-(\d{8,})-(?:rank-(\d{5,})-of-(\d{5,})|(off))\.journal")


class RankFile(NamedTuple):
    """A rank's file of a part, up to the first damaged or incomplete frame."""

    path: Path
    layout: Layout
    frames: list[Frame]
    damage: str
    """Reason why it ends early; "" also if only the last frame was cut off, as by a kill."""

    @property
    def last_step(self) -> int:
        """The last step in the file."""
        return self.frames[-1].step if self.frames else self.layout.begin_step - 1


class Part(NamedTuple):
    """The files that one start of the run wrote."""

    number: int
    begin_step: int
    end_step: int
    """The last step that counts: where the next part starts, it replaces this one."""
    files: list[RankFile]
    """One per rank, in order; empty after an end mark, or if there is a `problem`."""
    problem: str = ""
    """Why the part cannot be read, or ""."""

    @property
    def last_step(self) -> int:
        """The last step that counts and all ranks have; `begin_step` - 1 if there is none."""
        written = [file.last_step for file in self.files] or [self.begin_step - 1]
        return min(self.end_step, *written)

    @property
    def gap(self) -> str:
        """Steps that the part should have and has not, in words, or ""."""
        damage = [file.damage for file in self.files if file.damage and file.last_step < self.end_step]
        if self.problem or damage:
            return self.problem or damage[0]
        if self.files and self.last_step < self.end_step < NO_END:
            return (
                f"part {self.number} ends at step {self.last_step:,}, but the run continued to step {self.end_step:,}"
            )
        return ""


def read_parts(run: Path) -> list[Part]:
    """List the parts of a run's journal in order of their start, without reading payloads.

    Raises:
        ValueError: there is no journal, or no part can be read.
    """
    folder = run / FOLDER
    files_of: dict[tuple[int, int], dict[int, Path]] = {}
    sizes: dict[tuple[int, int], int] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := NAME.fullmatch(path.name):
            number, begin_step, rank, world_size, _ = match.groups()
            key = int(number), int(begin_step)
            sizes[key] = int(world_size or 0)
            files = files_of.setdefault(key, {})
            if rank is not None:
                files[int(rank)] = path
    parts: list[Part] = []
    end_step = NO_END
    for (number, begin_step), files in sorted(files_of.items(), reverse=True):
        if begin_step < end_step or not parts:  # else a later part replaces all of it
            parts.insert(0, _read_part(number, begin_step, end_step, files, sizes[number, begin_step]))
        end_step = min(end_step, begin_step)
    if not any(part.files for part in parts):
        problem = next((part.problem for part in parts if part.problem), "")
        raise ValueError(
            problem or f"{run} has no flip journal: expected a run that was trained with --journal.enabled True"
        )
    return parts


def _read_part(number: int, begin_step: int, end_step: int, files: dict[int, Path], world_size: int) -> Part:
    if missing := sorted(set(range(world_size)) - files.keys()):
        problem = (
            f"part {number} of the flip journal lacks the file of rank {', '.join(map(str, missing))} of "
            f"{world_size}: the files of all ranks are needed"
        )
        return Part(number, begin_step, end_step, [], problem)
    try:
        return Part(number, begin_step, end_step, [scan(path) for _, path in sorted(files.items())])
    except ValueError as error:
        return Part(number, begin_step, end_step, [], str(error))


def scan(path: Path) -> RankFile:
    """List the frames of a file without reading their payloads.

    Raises:
        ValueError: it has no valid header.
    """
    layout, offset = read_header(path)
    frames: list[Frame] = []
    size, damage, next_step = path.stat().st_size, "", layout.begin_step
    with path.open("rb") as file:
        while size - offset >= FRAME_BYTES:
            file.seek(offset)
            frame = parse_frame(file.read(FRAME_BYTES), offset)
            if frame is None:
                damage = f"{path} is damaged at byte {offset:,}, after step {next_step - 1:,}"
                break
            if frame.step != (next_step if not frames or frame.kind != SIGNS else next_step - 1):
                damage = f"{path} has step {frame.step:,} where step {next_step:,} was expected"
                break
            offset = frame.offset + frame.length
            if offset > size:
                break
            frames.append(frame)
            next_step = frame.step + 1
    return RankFile(path, layout, frames, damage)


def part_of(parts: list[Part], step: int) -> Part:
    """Return the part that has the weights after `step`.

    Raises:
        ValueError: there is none; names the steps that the journal covers.
    """
    for part in reversed(parts):
        if part.files and part.begin_step <= step <= part.last_step:
            return part
    gaps = [part.gap for part in parts if part.gap and part.begin_step <= step <= part.end_step]
    reason = f" ({gaps[0]})" if gaps else ""
    raise ValueError(
        f"the flip journal does not have step {step:,}: it covers the steps {covered(parts)}{reason}; ask for "
        "one of those"
    )


def covered(parts: list[Part]) -> str:
    """Describe the steps that the journal has."""
    spans: list[list[int]] = []
    for part in parts:
        if part.files and part.last_step >= part.begin_step:
            if spans and part.begin_step <= spans[-1][1] + 1:
                spans[-1][1] = max(spans[-1][1], part.last_step)
            else:
                spans.append([part.begin_step, part.last_step])
    return ", ".join(f"{first:,} to {last:,}" for first, last in spans) or "none"


def signs_after(file: RankFile, step: int) -> Bytes:
    """Return the packed signs of a rank's slices after `step`.

    Raises:
        ValueError: a frame in between is damaged.
    """
    wanted = [frame for frame in file.frames if frame.step <= step]
    start = max(index for index, frame in enumerate(wanted) if frame.kind == SIGNS)
    signs = np.empty(file.layout.num_weights // 8, np.uint8)
    with file.path.open("rb") as opened:
        for frame in wanted[start:]:
            apply_frame_(signs, frame, file.path, opened.fileno())
    return signs


def replay(file: RankFile, last_step: int) -> Iterator[tuple[int, Bytes]]:
    """Yield (step, packed signs) up to `last_step`; the array is changed in place.

    Raises:
        ValueError: a frame is damaged, or whole signs differ from what the flips before them lead
            to.
    """
    signs = np.empty(file.layout.num_weights // 8, np.uint8)
    with file.path.open("rb") as opened:
        for index, frame in enumerate(file.frames):
            if frame.step > last_step:
                return
            before = signs.copy() if frame.kind == SIGNS else signs
            apply_frame_(signs, frame, file.path, opened.fileno())
            if index and not np.array_equal(before, signs):
                raise ValueError(f"{file.path}: the signs after step {frame.step:,} are not what the flips lead to")
            yield frame.step, signs


def apply_frame_(signs: Bytes, frame: Frame, path: Path, descriptor: int) -> None:
    """Read the payload of `frame` and apply it to `signs`.

    Raises:
        ValueError: it is damaged.
    """
    payload = os.pread(descriptor, frame.length, frame.offset)
    problem = "" if zlib.crc32(payload) == frame.crc else "its crc32 differs"
    if not problem:
        try:
            apply_(signs, frame.kind, frame.num_flips, payload)
        except (ValueError, zlib.error) as error:
            problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged: the frame of step {frame.step:,} has changed ({problem})")


def joined(layouts: list[Layout], signs: list[Bytes]) -> dict[str, Tensor]:
    """Assemble packed signs per parameter, uint8 [ceil(numel / 8)], from all ranks' slices.

    Raises:
        ValueError: a part of a parameter is missing.
    """
    shapes = layouts[0].shapes
    joined_signs = {
        name: torch.zeros(-(-torch.Size(shape).numel() // 8), dtype=torch.uint8) for name, shape in shapes.items()
    }
    missing = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    for layout, slices in zip(layouts, signs, strict=True):
        for piece in layout.pieces:
            length = -(-piece.numel // 8)
            packed = torch.from_numpy(slices[piece.low // 8 : piece.low // 8 + length].copy())
            joined_signs[piece.name][piece.first // 8 : piece.first // 8 + length] = packed
            missing[piece.name] -= piece.numel
    if incomplete := [name for name, numel in missing.items() if numel]:
        raise ValueError(f"the flip journal does not have all of {incomplete[0]}: its files belong to different runs")
    return joined_signs


def weights_after(run: Path, step: int) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return packed signs and shape of every binary parameter after `step`, by name.

    Raises:
        ValueError: the journal does not have the step, or is damaged.
    """
    part = part_of(read_parts(run), step)
    layouts = [file.layout for file in part.files]
    return joined(layouts, [signs_after(file, step) for file in part.files]), layouts[0].shapes
