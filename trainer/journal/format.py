"""The flip journal: every flip of every step of a run, so that the binary weights of any step can be rebuilt. How its files look.

    journal/part-0001-step-00000000-rank-00000-of-00002.journal, ...     a part a process start, a file a rank

A part begins where its run began or was resumed, and stands alone. A file is MAGIC, length and crc32 of a header in JSON
(`Layout`), the header, then frames one behind another:

    signs      the packed signs of this rank's slices, after the step: the first frame, and again wherever the flips since have
               taken SIGNS_EVERY times their room, so that reading never begins far back
    gaps       a step with few flips: between one flipped weight and the next, so many that did not flip
    wide gaps  a step with very few: the same, its low bytes apart
    bitmap     a step with many: a bit a weight
    skipped    a step that updated nothing, because a gradient was not finite

Each step has one frame, in order. Weights are counted through this rank's slices of all binary buckets, laid end to end. A gap
is written as gap // 255 bytes of 255 and one of gap % 255, then deflated without searching for repetitions (Huffman codes alone):
about the entropy of flips that do not know of each other, at any density (docs/journal.md).
"""

import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FOLDER = "journal"
MAGIC = b"bitfleet flip journal 1\n"
SIGNS, GAPS, WIDE_GAPS, BITMAP, SKIPPED = range(5)
SIGNS_EVERY = 32
DENSE = 16
"""Bitmap from one flip in so many weights on: the gaps are as long and take twice the time."""
WIDE = 1024
"""Wide gaps up to one flip in so many weights: else most bytes of a gap are 255."""
_HEAD = struct.Struct("<QIIIBxxx")  # step, flips, payload bytes, crc32 of the payload, kind
_CRC = struct.Struct("<I")
FRAME_BYTES = _HEAD.size + _CRC.size
Bytes = npt.NDArray[np.uint8]


class Piece(NamedTuple):
    """A stretch of a parameter in a rank's slices."""

    name: str
    first: int
    """Its first element within the parameter, a multiple of 8."""
    low: int
    """Its first element within the slices, a multiple of 8."""
    numel: int


class Layout(NamedTuple):
    """What a file holds: its header."""

    begin_step: int
    rank: int
    world_size: int
    num_weights: int
    """Elements of this rank's slices with their padding, a multiple of 64."""
    shapes: dict[str, list[int]]
    """Of all binary parameters."""
    pieces: list[Piece]


class Frame(NamedTuple):
    """A frame without its payload."""

    kind: int
    step: int
    num_flips: int
    offset: int
    """Of the payload within the file."""
    length: int
    crc: int


def file_name(part: int, begin_step: int, rank: int, world_size: int) -> str:
    """Name of a rank's file of a part."""
    return f"part-{part:04d}-step-{begin_step:08d}-rank-{rank:05d}-of-{world_size:05d}.journal"


def marker_name(part: int, begin_step: int) -> str:
    """Name of the empty file that says: from this step on the run was continued without a journal."""
    return f"part-{part:04d}-step-{begin_step:08d}-off.journal"


def header(layout: Layout) -> bytes:
    """The beginning of a file."""
    text = json.dumps(layout._asdict()).encode()
    return MAGIC + _CRC.pack(len(text)) + _CRC.pack(zlib.crc32(text)) + text


def read_header(path: Path) -> tuple[Layout, int]:
    """The header of a file, and where its frames begin.

    Raises:
        ValueError: it is none, or it is not as it was written.
    """
    size = len(MAGIC) + 2 * _CRC.size
    with path.open("rb") as file:
        start = file.read(size)
        if not start.startswith(MAGIC) or len(start) < size:
            raise ValueError(f"{path} is no flip journal of this version: expected it to begin with {MAGIC!r}")
        length, crc = (value for (value,) in _CRC.iter_unpack(start[len(MAGIC) :]))
        text = file.read(length)
    if len(text) < length or zlib.crc32(text) != crc:
        raise ValueError(f"the flip journal {path} is damaged: its header is not as it was written")
    layout = Layout(**json.loads(text))
    return layout._replace(pieces=[Piece(*piece) for piece in layout.pieces]), size + length


def frame(kind: int, step: int, num_flips: int, payload: bytes) -> bytes:
    """A frame as bytes."""
    head = _HEAD.pack(step, num_flips, len(payload), zlib.crc32(payload), kind)
    return head + _CRC.pack(zlib.crc32(head)) + payload


def parse_frame(head: bytes, offset: int) -> Frame | None:
    """The frame that begins with `head` (FRAME_BYTES) at `offset` of its file; None if those are not as they were written."""
    if zlib.crc32(head[: _HEAD.size]) != _CRC.unpack(head[_HEAD.size :])[0]:
        return None
    step, num_flips, length, crc, kind = _HEAD.unpack(head[: _HEAD.size])
    return Frame(kind, step, num_flips, offset + FRAME_BYTES, length, crc)


def encode(step: int, flips: Bytes) -> bytes:
    """The frame of a step.

    Args:
        step: its number, from 1.
        flips: packed, uint8 [n / 8], least significant bit first.
    """
    num_flips, num_weights = int(np.bitwise_count(flips).sum()), 8 * flips.size
    if num_flips * DENSE >= num_weights:
        return frame(BITMAP, step, num_flips, _deflate(flips))
    gaps = np.diff(_positions(flips), prepend=-1) - 1
    if num_flips * WIDE >= num_weights:
        return frame(GAPS, step, num_flips, _deflate(_escaped(gaps)))
    low = (gaps & 255).astype(np.uint8)
    return frame(WIDE_GAPS, step, num_flips, low.tobytes() + _deflate(_escaped(gaps >> 8)))


def apply_(signs: Bytes, kind: int, num_flips: int, payload: bytes) -> None:
    """Do to packed `signs`, in place, what a frame says.

    Raises:
        ValueError: the payload does not fit.
    """
    if kind == SKIPPED:
        return
    if kind in (SIGNS, BITMAP):
        whole = np.frombuffer(payload if kind == SIGNS else zlib.decompress(payload, -15), np.uint8)
        if whole.size != signs.size:
            raise ValueError(f"{whole.size:,} bytes instead of {signs.size:,}")
        np.copyto(signs, whole) if kind == SIGNS else np.bitwise_xor(signs, whole, out=signs)
        return
    if kind == GAPS:
        gaps = _unescaped(zlib.decompress(payload, -15))
    else:
        low = np.frombuffer(payload[:num_flips], np.uint8)
        gaps = (_unescaped(zlib.decompress(payload[num_flips:], -15)) << 8) | low
    where = np.cumsum(gaps + 1) - 1
    if where.size != num_flips or (num_flips and where[-1] >= 8 * signs.size):
        raise ValueError(f"{where.size:,} flips instead of {num_flips:,} in {8 * signs.size:,} weights")
    np.bitwise_xor.at(signs, where >> 3, np.left_shift(1, where & 7).astype(np.uint8))


def _positions(flips: Bytes) -> npt.NDArray[np.int64]:
    touched = np.flatnonzero(flips)
    bits = np.flatnonzero(np.unpackbits(flips[touched], bitorder="little"))
    where: npt.NDArray[np.int64] = touched[bits >> 3] * 8 + (bits & 7)
    return where


def _escaped(gaps: npt.NDArray[np.int64]) -> Bytes:
    ends = np.cumsum(gaps // 255 + 1)
    out = np.full(int(ends[-1]) if ends.size else 0, 255, np.uint8)
    out[ends - 1] = gaps % 255
    return out


def _unescaped(written: bytes) -> npt.NDArray[np.int64]:
    values = np.frombuffer(written, np.uint8)
    gaps: npt.NDArray[np.int64] = np.diff(np.cumsum(values, dtype=np.int64)[values != 255], prepend=0)
    return gaps


def _deflate(values: Bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(values.tobytes()) + packer.flush()
