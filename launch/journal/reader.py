"""Reading the flip journal: which steps it covers, and the binary weights after any of them."""

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
    """A rank's file of a part, as far as it is whole."""

    path: Path
    layout: Layout
    frames: list[Frame]
    num_bytes: int
    """Of the whole file."""
    damage: str
    """What ends it before its time, in words; "" also where only a last frame was cut off, as by a kill."""

    @property
    def last_step(self) -> int:
        """The last step that is in it."""
        return self.frames[-1].step if self.frames else self.layout.begin_step - 1


class Part(NamedTuple):
    """What one start of the run wrote."""

    number: int
    begin_step: int
    end_step: int
    """Its last step that counts: where the next part begins, an earlier one has nothing more to say."""
    files: list[RankFile]
    """Of all ranks, in their order; none where the run was continued without a journal, or where there is a `problem`."""
    problem: str = ""
    """Why the part cannot be read, in words."""

    @property
    def last_step(self) -> int:
        """The last step that all ranks have written and that counts; one before `begin_step` where there is none."""
        written = [file.last_step for file in self.files] or [self.begin_step - 1]
        return min(self.end_step, *written)

    @property
    def gap(self) -> str:
        """What is missing of the steps that it should have, in words."""
        damage = [file.damage for file in self.files if file.damage and file.last_step < self.end_step]
        if self.problem or damage:
            return self.problem or damage[0]
        if self.files and self.last_step < self.end_step < NO_END:
            return f"part {self.number} ends at step {self.last_step:,}, but the run went on to step {self.end_step:,}"
        return ""


def read_parts(run: Path) -> list[Part]:
    """The parts of a run's journal, in the order in which they were begun; payloads are not read.

    Raises:
        ValueError: there is no journal, or none of it can be read.
    """
    folder = run / FOLDER
    found: dict[tuple[int, int], dict[int, Path]] = {}
    sizes: dict[tuple[int, int], int] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := NAME.fullmatch(path.name):
            number, begin_step, rank, world_size, _ = match.groups()
            key = int(number), int(begin_step)
            sizes[key] = int(world_size or 0)
            files = found.setdefault(key, {})
            if rank is not None:
                files[int(rank)] = path
    parts: list[Part] = []
    end_step = NO_END
    for (number, begin_step), files in sorted(found.items(), reverse=True):
        if begin_step < end_step or not parts:  # else the run went back to its begin, and nothing of it counts
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
            f"part {number} of the flip journal lacks the file of rank {', '.join(map(str, missing))} of {world_size}: "
            f"the files of all ranks are needed"
        )
        return Part(number, begin_step, end_step, [], problem)
    try:
        return Part(number, begin_step, end_step, [scan(path) for _, path in sorted(files.items())])
    except ValueError as error:
        return Part(number, begin_step, end_step, [], str(error))


def scan(path: Path) -> RankFile:
    """The frames of a file, without their payloads.

    Raises:
        ValueError: it has no header.
    """
    layout, offset = read_header(path)
    frames: list[Frame] = []
    size, damage, next_step = path.stat().st_size, "", layout.begin_step
    with path.open("rb") as file:
        while size - offset >= FRAME_BYTES:
            file.seek(offset)
            frame = parse_frame(file.read(FRAME_BYTES), offset)
            if frame is None:
                damage = f"{path} is damaged at byte {offset:,}, behind step {next_step - 1:,}"
                break
            if frame.step != (next_step if not frames or frame.kind != SIGNS else next_step - 1):
                damage = f"{path} has step {frame.step:,} where step {next_step:,} was expected"
                break
            offset = frame.offset + frame.length
            if offset > size:
                break
            frames.append(frame)
            next_step = frame.step + 1
    return RankFile(path, layout, frames, size, damage)


def part_of(parts: list[Part], step: int) -> Part:
    """The part that has the weights after `step`.

    Raises:
        ValueError: none has; says which steps there are.
    """
    for part in reversed(parts):
        if part.files and part.begin_step <= step <= part.last_step:
            return part
    gaps = [part.gap for part in parts if part.gap and part.begin_step <= step <= part.end_step]
    why = f" ({gaps[0]})" if gaps else ""
    raise ValueError(
        f"the flip journal does not have step {step:,}: it covers the steps {covered(parts)}{why}; ask for one of those"
    )


def covered(parts: list[Part]) -> str:
    """The steps that the journal has, in words."""
    spans: list[list[int]] = []
    for part in parts:
        if part.files and part.last_step >= part.begin_step:
            if spans and part.begin_step <= spans[-1][1] + 1:
                spans[-1][1] = max(spans[-1][1], part.last_step)
            else:
                spans.append([part.begin_step, part.last_step])
    return ", ".join(f"{first:,} to {last:,}" for first, last in spans) or "none"


def signs_after(file: RankFile, step: int) -> Bytes:
    """The packed signs of a rank's slices after `step`, which the file has; reads from the last signs before it.

    Raises:
        ValueError: a frame in between is not as it was written.
    """
    wanted = [frame for frame in file.frames if frame.step <= step]
    start = max(index for index, frame in enumerate(wanted) if frame.kind == SIGNS)
    signs = np.empty(file.layout.num_weights // 8, np.uint8)
    with file.path.open("rb") as opened:
        for frame in wanted[start:]:
            apply_frame_(signs, frame, file.path, opened.fileno())
    return signs


def replay(file: RankFile, last_step: int) -> Iterator[tuple[int, Bytes]]:
    """(step, packed signs after it) from the begin of a file to `last_step`; the signs are the same array, changed in place.

    Raises:
        ValueError: a frame is not as it was written, or signs in the file are not what the flips before them lead to.
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
    """Read the payload of `frame` and do to `signs` what it says.

    Raises:
        ValueError: it is not as it was written.
    """
    payload = os.pread(descriptor, frame.length, frame.offset)
    problem = "" if zlib.crc32(payload) == frame.crc else "its crc32 differs"
    if not problem:
        try:
            apply_(signs, frame.kind, frame.num_flips, payload)
        except (ValueError, zlib.error) as error:
            problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged: the frame of step {frame.step:,} is not as it was written ({problem})")


def joined(layouts: list[Layout], signs: list[Bytes]) -> dict[str, Tensor]:
    """Packed signs of every parameter, uint8 [ceil(numel / 8)], from those of all ranks' slices.

    Raises:
        ValueError: the ranks' pieces leave some of a parameter out.
    """
    shapes = layouts[0].shapes
    whole = {name: torch.zeros(-(-torch.Size(shape).numel() // 8), dtype=torch.uint8) for name, shape in shapes.items()}
    missing = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    for layout, mine in zip(layouts, signs, strict=True):
        for piece in layout.pieces:
            length = -(-piece.numel // 8)
            stretch = torch.from_numpy(mine[piece.low // 8 : piece.low // 8 + length].copy())
            whole[piece.name][piece.first // 8 : piece.first // 8 + length] = stretch
            missing[piece.name] -= piece.numel
    if incomplete := [name for name, numel in missing.items() if numel]:
        raise ValueError(f"the flip journal does not have all of {incomplete[0]}: its files are of different runs")
    return whole


def weights_after(run: Path, step: int) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """(packed signs, shape) of every binary parameter after `step` optimizer steps.

    Raises:
        ValueError: the journal does not have the step, or is damaged.
    """
    part = part_of(read_parts(run), step)
    layouts = [file.layout for file in part.files]
    return joined(layouts, [signs_after(file, step) for file in part.files]), layouts[0].shapes
