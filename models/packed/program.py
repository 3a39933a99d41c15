"""The packed program of a network: operations on images [height][width][channels], and its file.

The file is safetensors. "program" int32 [operations, 20] and "buffers" int32 [buffers, 5] hold the
fields of `Operation` and `Buffer` (packed.c explains them), "0", "1", ... the weights; the metadata
hold a JSON description. No torch is needed to read it.
"""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

FORMAT = 1
NUM_FIELDS = 20
Array = NDArray[Any]


class Type(enum.IntEnum):
    """Elements of a buffer."""

    FLOATS = 0
    SIGNS = 1
    SUMS = 2


class Kind(enum.IntEnum):
    """Operations, as in packed.c."""

    NORMALIZE = 0
    CONV = 1
    BINARY_CONV = 2
    AFFINE = 3
    LAYER_NORM = 4
    MAX_POOL = 5
    AVG_POOL = 6
    SIGN = 7
    THRESHOLD = 8
    MEAN = 9
    ADD = 10
    DEPTHWISE = 11
    CONCAT = 12
    SIGMOID = 13
    SCALE = 14


class Flag(enum.IntFlag):
    """Options of an operation."""

    NONE = 0
    RELU = 1
    BINARY_WEIGHT = 2
    RELU_FIRST = 4
    """ReLU before factor and offset."""
    PAD_ONES = 8
    """A binary convolution pads with +1, which are products; else padding is none."""
    COUNT_PADDING = 16
    """A mean of pixels counts the zeros outside of the image."""


@dataclasses.dataclass(eq=False)
class Buffer:
    """An image between two operations."""

    height: int
    width: int
    channels: int
    type: Type = Type.FLOATS
    slot: int = -1


@dataclasses.dataclass(eq=False)
class Operation:
    """One operation; tensors are what the file stores.

    CONV, BINARY_CONV to floats, DEPTHWISE, AFFINE, ADD, LAYER_NORM and SCALE end with these steps,
    each rounded: ReLU (RELU_FIRST), times factor, plus offset, plus `other`, plus shift, ReLU,
    negative values times slope, plus after.
    """

    kind: Kind
    source: Buffer
    target: Buffer
    other: Buffer | None = None
    """Added to the result of a convolution, an affine map or ADD. CONCAT: the channels behind those
    of the source. SCALE: a factor per channel, [1][1][channels]."""
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    top: int = 0
    left: int = 0
    flags: Flag = Flag.NONE
    weight: Array | None = None
    """float32 [taps, channels, outputs]; of binary weights bool, of BINARY_CONV [outputs, taps,
    channels], of DEPTHWISE [taps, channels]."""
    factor: Array | None = None
    """Per channel: float32; NORMALIZE: deviation; target SIGNS: int32 thresholds."""
    offset: Array | None = None
    """Per channel: float32; NORMALIZE: mean; target SIGNS: int32 directions; SIGN: float32, added
    before the sign."""
    real: float = 0.0
    """Epsilon of LAYER_NORM."""
    signs: Buffer | None = None
    """Gets the signs of the result, which are packed along the way."""
    shift: Array | None = None
    """Per channel, float32, as slope, after and sign_shift; of results of type FLOATS."""
    slope: Array | None = None
    after: Array | None = None
    sign_shift: Array | None = None
    """Added to the result before its signs are packed."""

    @property
    def buffers(self) -> list[Buffer]:
        """All buffers that it reads or writes."""
        return [b for b in (self.source, self.other, self.target, self.signs) if b is not None]


@dataclasses.dataclass(eq=False)
class Program:
    """A network: operations in order, and what a person should know of it."""

    operations: list[Operation]
    description: dict[str, Any]


def assign_slots(operations: Sequence[Operation]) -> list[Buffer]:
    """Give buffers that are not alive at the same time the same memory; return all buffers.

    A sum takes the place of what it adds, if nothing else reads that: half the memory to walk
    through.
    """
    buffers: list[Buffer] = []
    last: dict[int, int] = {}
    for index, operation in enumerate(operations):
        for buffer in operation.buffers:
            if all(buffer is not other for other in buffers):
                buffers.append(buffer)
            last[id(buffer)] = index
    free: list[int] = []
    num_slots = 0
    alive: list[Buffer] = []
    for index, operation in enumerate(operations):
        added = operation.other if operation.kind not in (Kind.SCALE, Kind.CONCAT) else None
        if added not in (None, operation.source) and last[id(added)] == index and operation.target.slot < 0:
            assert added is not None
            operation.target.slot = added.slot
            alive.remove(added)
            alive.append(operation.target)
        for buffer in operation.buffers:
            if buffer.slot < 0:
                buffer.slot = free.pop() if free else num_slots
                num_slots = max(num_slots, buffer.slot + 1)
                alive.append(buffer)
        for buffer in [buffer for buffer in alive if last[id(buffer)] <= index]:
            alive.remove(buffer)
            free.append(buffer.slot)
    return buffers


def tensors_of(program: Program) -> dict[str, Array]:
    """Return the tensors of the file."""
    buffers = assign_slots(program.operations)
    index = {id(buffer): number for number, buffer in enumerate(buffers)}
    tensors: dict[str, Array] = {}

    def add(values: Array | None) -> int:
        if values is None:
            return -1
        bits = np.packbits(values.reshape(-1), bitorder="little") if values.dtype == bool else values
        tensors[str(len(tensors))] = np.ascontiguousarray(bits)
        return len(tensors) - 1

    rows = np.zeros((len(program.operations), NUM_FIELDS), np.int32)
    for row, o in zip(rows, program.operations, strict=True):
        other = -1 if o.other is None else index[id(o.other)]
        fields = [o.kind, index[id(o.source)], other, index[id(o.target)], *o.kernel, o.stride, o.top, o.left, o.flags]
        fields += [add(o.weight), add(o.factor), add(o.offset), int(np.float32(o.real).view(np.int32))]
        fields.append(-1 if o.signs is None else index[id(o.signs)])
        fields += [add(o.shift), add(o.slope), add(o.after), add(o.sign_shift)]
        row[: len(fields)] = fields
    table = [[b.height, b.width, b.channels, b.type, b.slot] for b in buffers]
    return {"program": rows, "buffers": np.array(table, np.int32), **tensors}


def digest(tensors: Mapping[str, Array], description: Mapping[str, Any]) -> str:
    """Return the sha256 of all tensors, with names and shapes, and of the description."""
    found = hashlib.sha256(json.dumps(dict(description), sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        found.update(np.ascontiguousarray(tensors[name]).tobytes())
    return found.hexdigest()


def to_bytes(program: Program) -> bytes:
    """Return the file of `program`."""
    tensors = tensors_of(program)
    description = {"format": FORMAT, **program.description}
    text = json.dumps({**description, "sha256": digest(tensors, description)})
    content: bytes = safetensors.numpy.save(tensors, metadata={"bitfleet": text})
    return content


def read_description(path: Path) -> dict[str, Any]:
    """Return the description of a program file, after comparing its hash.

    Raises:
        ValueError: it cannot be read, is not a program of bitfleet, is damaged, or of a later
            version.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get("bitfleet")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a packed program of bitfleet, or cut off ({error})") from None
    if text is None:
        raise ValueError(f"{path} is not a packed program of bitfleet: make one with bitfleet export RUN OUT")
    try:
        description = json.loads(text)
    except json.JSONDecodeError:
        description = None
    if not isinstance(description, dict):
        raise ValueError(f"{path} is damaged: its description is not JSON")
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} has format {description.get('format')}, this bitfleet reads {FORMAT}: update it")
    if description.pop("sha256", None) != digest(tensors, description):
        raise ValueError(f"{path} is damaged: its sha256 is not the one that it was written with")
    return description
