"""The format of the flip journal's files.

    journal/part-0001-step-00000000-rank-00000-of-00002.journal, ...

One part per start, one file per rank. A part begins at the step where the run started or resumed,
and can be read without the others. A file is MAGIC, length and crc32 of a header in JSON
(`Layout`), the header, then a sequence of frames:

    signs      packed signs of this rank's slices after the step: the first frame, and again when
               the flips since take SIGNS_EVERY times their space, so that reading starts nearby
    gaps       a step with few flips: the number of weights between one flipped weight and the next
    wide gaps  a step with very few flips: the same, with the low bytes stored apart
    bitmap     a step with many flips: one bit per weight
    skipped    a step that updated nothing, because a gradient was not finite

Each step has one frame, in order. Weights are counted through this rank's slices of all binary
buckets, laid end to end. A gap is written as gap // 255 bytes of 255 and one byte of gap % 255,
then deflated with Huffman codes only: about the entropy of independent flips, at any density
(docs/journal.md).
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
"""A bitmap if at least one weight in N flips: gaps would be as long and take twice the time."""
WIDE = 1024
"""Wide gaps if fewer than one weight in N flips: otherwise most bytes of a gap would be 255."""
_HEAD = struct.Struct("<QIIIBxxx")  # step, flips, payload bytes, crc32 of the payload, kind
_CRC = struct.Struct("<I")
FRAME_BYTES = _HEAD.size + _CRC.size
Bytes = npt.NDArray[np.uint8]


class Piece(NamedTuple):
    """A contiguous part of a parameter in a rank's slices."""

    name: str
    first: int
    """First element within the parameter, a multiple of 8."""
    low: int
    """First element within the slices, a multiple of 8."""
    numel: int


class Layout(NamedTuple):
    """The header of a file."""

    begin_step: int
    rank: int
    world_size: int
    num_weights: int
    """Elements of this rank's slices with padding, a multiple of 64."""
    shapes: dict[str, list[int]]
    """Name -> shape of all binary parameters."""
    pieces: list[Piece]


class Frame(NamedTuple):
    """A frame without its payload."""

    kind: int
    step: int
    num_flips: int
    offset: int
    """Offset of the payload within the file."""
    length: int
    crc: int


def file_name(part: int, begin_step: int, rank: int, world_size: int) -> str:
    """Return the name of a rank's file of a part."""
    return f"part-{part:04d}-step-{begin_step:08d}-rank-{rank:05d}-of-{world_size:05d}.journal"


def marker_name(part: int, begin_step: int) -> str:
    """Return the name of the empty file that marks the end of a journal at this step."""
    return f"part-{part:04d}-step-{begin_step:08d}-off.journal"


def header(layout: Layout) -> bytes:
    """Return MAGIC and the header as bytes."""
    text = json.dumps(layout._asdict()).encode()
    return MAGIC + _CRC.pack(len(text)) + _CRC.pack(zlib.crc32(text)) + text


def read_header(path: Path) -> tuple[Layout, int]:
    """Read the header of a file; return it and the offset of the first frame.

    Raises:
        ValueError: the file is not a journal, or its header is damaged.
    """
    size = len(MAGIC) + 2 * _CRC.size
    with path.open("rb") as file:
        start = file.read(size)
        if not start.startswith(MAGIC) or len(start) < size:
            raise ValueError(f"{path} is not a flip journal of this version: expected it to start with {MAGIC!r}")
        length, crc = (value for (value,) in _CRC.iter_unpack(start[len(MAGIC) :]))
        text = file.read(length)
    if len(text) < length or zlib.crc32(text) != crc:
        raise ValueError(f"the flip journal {path} is damaged: its header has changed")
    layout = Layout(**json.loads(text))
    return layout._replace(pieces=[Piece(*piece) for piece in layout.pieces]), size + length


def frame(kind: int, step: int, num_flips: int, payload: bytes) -> bytes:
    """Return a frame as bytes."""
    head = _HEAD.pack(step, num_flips, len(payload), zlib.crc32(payload), kind)
    return head + _CRC.pack(zlib.crc32(head)) + payload


def parse_frame(head: bytes, offset: int) -> Frame | None:
    """Parse the first FRAME_BYTES of the frame at `offset`; return None if they are damaged."""
    if zlib.crc32(head[: _HEAD.size]) != _CRC.unpack(head[_HEAD.size :])[0]:
        return None
    step, num_flips, length, crc, kind = _HEAD.unpack(head[: _HEAD.size])
    return Frame(kind, step, num_flips, offset + FRAME_BYTES, length, crc)


def encode(step: int, flips: Bytes) -> bytes:
    """Encode the flips of a step as a frame, in the shortest form.

    Args:
        step: number of the step, from 1.
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
    """Apply a frame to packed `signs` in place.

    Raises:
        ValueError: the payload does not fit.
    """
    if kind == SKIPPED:
        return
    if kind in (SIGNS, BITMAP):
        packed = np.frombuffer(payload if kind == SIGNS else zlib.decompress(payload, -15), np.uint8)
        if packed.size != signs.size:
            raise ValueError(f"{packed.size:,} bytes instead of {signs.size:,}")
        np.copyto(signs, packed) if kind == SIGNS else np.bitwise_xor(signs, packed, out=signs)
        return
    if kind == GAPS:
        gaps = _unescaped(zlib.decompress(payload, -15))
    else:
        low = np.frombuffer(payload[:num_flips], np.uint8)
        gaps = (_unescaped(zlib.decompress(payload[num_flips:], -15)) << 8) | low
    flipped = np.cumsum(gaps + 1) - 1
    if flipped.size != num_flips or (num_flips and flipped[-1] >= 8 * signs.size):
        raise ValueError(f"{flipped.size:,} flips instead of {num_flips:,} in {8 * signs.size:,} weights")
    np.bitwise_xor.at(signs, flipped >> 3, np.left_shift(1, flipped & 7).astype(np.uint8))


def _positions(flips: Bytes) -> npt.NDArray[np.int64]:
    touched = np.flatnonzero(flips)
    bits = np.flatnonzero(np.unpackbits(flips[touched], bitorder="little"))
    positions: npt.NDArray[np.int64] = touched[bits >> 3] * 8 + (bits & 7)
    return positions


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
