"""The C library refuses programs that it cannot run within its limits, and says why."""

import ctypes
import json
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from bitfleet.packed.program import Array, Buffer, Kind, Operation, Program, Type, tensors_of, to_bytes
from bitfleet.packed.runner import PackedNetwork, library
from tests.unit.models.packed.programs import CLASSES, network, random_image

Tensors = dict[str, Array]
CHANNELS, SIZE = 3, 8
SUMS = 2
"""Number of the operation that compares sums."""


def small() -> Program:
    """Return NORMALIZE, SIGN, BINARY_CONV to signs, BINARY_CONV to floats, ADD, MEAN."""
    image, normalized = (Buffer(SIZE, SIZE, CHANNELS) for _ in range(2))
    signs, compared = (Buffer(SIZE, SIZE, CHANNELS, Type.SIGNS) for _ in range(2))
    floats, added, logits = Buffer(SIZE, SIZE, CHANNELS), Buffer(SIZE, SIZE, CHANNELS), Buffer(1, 1, CHANNELS)
    ones, weight = np.ones(CHANNELS, np.float32), np.ones((CHANNELS, 1, CHANNELS), bool)
    thresholds, directions = np.zeros(CHANNELS, np.int32), np.ones(CHANNELS, np.int32)
    operations = [
        Operation(Kind.NORMALIZE, image, normalized, factor=ones, offset=ones),
        Operation(Kind.SIGN, normalized, signs),
        Operation(Kind.BINARY_CONV, signs, compared, weight=weight, factor=thresholds, offset=directions),
        Operation(Kind.BINARY_CONV, compared, floats, weight=weight),
        Operation(Kind.ADD, floats, added, other=normalized),
        Operation(Kind.MEAN, added, logits),
    ]
    return Program(operations, {"classes": CLASSES})


def newer() -> Program:
    """Return NORMALIZE, MEAN, SIGMOID, SCALE with signs, CONCAT, DEPTHWISE, SIGN, BINARY_CONV."""
    image, normalized, scaled = (Buffer(SIZE, SIZE, CHANNELS) for _ in range(3))
    mean, factors, logits = (Buffer(1, 1, channels) for channels in (CHANNELS, CHANNELS, 2))
    joined, filtered = (Buffer(side, side, 2 * CHANNELS) for side in (SIZE, 1))
    signs, last = Buffer(SIZE, SIZE, CHANNELS, Type.SIGNS), Buffer(1, 1, 2 * CHANNELS, Type.SIGNS)
    ones, slopes = np.ones(CHANNELS, np.float32), np.ones(2 * CHANNELS, np.float32)
    filters, weight = np.ones((SIZE * SIZE, 2 * CHANNELS), np.float32), np.ones((2, 1, 2 * CHANNELS), bool)
    operations = [
        Operation(Kind.NORMALIZE, image, normalized, factor=ones, offset=ones),
        Operation(Kind.MEAN, normalized, mean),
        Operation(Kind.SIGMOID, mean, factors),
        Operation(Kind.SCALE, normalized, scaled, other=factors, shift=ones, signs=signs, sign_shift=ones),
        Operation(Kind.CONCAT, scaled, joined, other=normalized),
        Operation(Kind.DEPTHWISE, joined, filtered, kernel=(SIZE, SIZE), weight=filters, slope=slopes, after=slopes),
        Operation(Kind.SIGN, filtered, last, offset=slopes),
        Operation(Kind.BINARY_CONV, last, logits, weight=weight),
    ]
    return Program(operations, {"classes": CLASSES})


def content_of(tensors: Tensors, text: str | None = None) -> bytes:
    metadata = {"bitfleet": json.dumps({"format": 1}) if text is None else text}
    return bytes(safetensors.numpy.save(tensors, metadata=metadata))


def load(content: bytes) -> PackedNetwork:
    return PackedNetwork(content, {})


KIND, SOURCE, OTHER, TARGET, KERNEL_H, KERNEL_W, STRIDE, TOP, LEFT, FLAGS, WEIGHT, FACTOR, OFFSET = range(13)
SHIFT, SLOPE, AFTER, SIGN_SHIFT = range(15, 19)


def set_field(operation: int, field: int, value: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors["program"][operation, field] = value

    return change


def set_buffers(column: int, before: int, value: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        values = tensors["buffers"][:, column]
        values[values == before] = value

    return change


def pool_everything(tensors: Tensors) -> None:
    """Make a program of a few hundred bytes ask for 2^52 steps."""
    tensors["buffers"][:, :2] = 8192
    tensors["buffers"][:, 2] = 1
    tensors["program"][1:, KIND] = Kind.MAX_POOL
    tensors["program"][1:, KERNEL_H : KERNEL_W + 1] = 4096
    tensors["program"][1:, FACTOR : OFFSET + 1] = -1
    tensors["program"][:, OTHER] = -1
    tensors["buffers"][:, 3] = Type.FLOATS
    tensors["program"][1:, SOURCE] = 1
    tensors["program"][1:, TARGET] = 2
    tensors["buffers"][:3, 4] = 0, 1, 2
    tensors["0"] = tensors["1"] = np.ones(1, np.float32)
    tensors["program"][1:, WEIGHT] = -1


def enlarge(tensors: Tensors) -> None:
    """Make the four images of floats 412 MiB each."""
    tensors["buffers"][:, :2] = np.where(tensors["buffers"][:, :2] == SIZE, 6000, 1)


def write_over_the_other(operation: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        row = tensors["program"][operation]
        tensors["buffers"][row[TARGET], 4] = tensors["buffers"][row[OTHER], 4]

    return change


def write_over_the_source(tensors: Tensors) -> None:
    """Make ADD write over its first input."""
    row = tensors["program"][4]
    tensors["buffers"][row[TARGET], 4] = tensors["buffers"][row[SOURCE], 4]


CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "work": (pool_everything, "it needs too much work for an image"),
    "memory": (enlarge, "it needs more memory than there is, or than 1 GiB"),
    "in place": (write_over_the_source, "it overwrites its input"),
    "one buffer": (set_buffers(0, SIZE, 1 << 16), "a buffer has an impossible size"),
    "type": (set_buffers(3, 1, 7), "a buffer is damaged"),
    "kind": (set_field(1, KIND, len(Kind)), "it has an operation of a later version"),
    "order": (set_field(1, KIND, Kind.NORMALIZE), "the image is not normalized first"),
    "source": (set_field(1, SOURCE, 99), "an operation has no buffer"),
    "unwritten": (set_field(1, SOURCE, 4), "it reads what no operation has written"),
    "image": (set_field(1, SOURCE, 0), "it reads what no operation has written"),
    "weight": (set_field(SUMS, WEIGHT, 0), "its weight has another size"),
    "window": (set_field(SUMS, KERNEL_H, 0), "its window is damaged"),
    "padding": (set_field(SUMS, TOP, 1), "its padding is damaged"),
    "stride": (set_field(SUMS, STRIDE, 2), "its output is larger than its input allows"),
    "no threshold": (set_field(SUMS, FACTOR, -1), "a tensor is missing"),
    "threshold": (lambda tensors: tensors["3"].fill(-(1 << 31)), "its thresholds are damaged"),
    "direction": (lambda tensors: tensors["4"].fill(0), "its thresholds are damaged"),
    "factor": (set_field(3, FACTOR, 2), "its factors have another size"),
    "other": (set_field(SUMS, OTHER, 1), "what it adds has another size"),
    "no other": (set_field(4, OTHER, -1), "it has one input"),
    "name": (lambda tensors: tensors.update(foreign=tensors["0"]), "a tensor has a foreign name"),
    "sign": (lambda tensors: tensors.update({"+9": tensors["0"]}), "a tensor has a foreign name"),
    "number": (lambda tensors: tensors.update({"4096": tensors["0"]}), "a tensor has a foreign name"),
    "empty": (lambda tensors: tensors.update({"9": np.zeros(0, np.float32)}), "a tensor is damaged or cut off"),
    "dtype": (lambda tensors: tensors.update({"9": np.zeros(2, np.float64)}), "a tensor is damaged or cut off"),
    "no program": (lambda tensors: tensors.pop("program"), "it holds no program of bitfleet"),
    "no operations": (
        lambda tensors: tensors.update(program=tensors["program"][:0]),
        "a tensor is damaged or cut off",
    ),
    "columns": (lambda tensors: tensors.update(program=tensors["program"][:, :19].copy()), "its program is damaged"),
    "result": (
        lambda tensors: tensors.update(program=tensors["program"][:-1].copy()),
        "its result is not a row of logits",
    ),
}


NEWER: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "kind": (set_field(1, KIND, -1), "it has an operation of a later version"),
    "factors in place": (write_over_the_other(3), "it overwrites its input"),
    "joined in place": (write_over_the_other(4), "it overwrites its input"),
    "no factors": (set_field(3, OTHER, -1), "it has one input"),
    "nothing joined": (set_field(4, OTHER, -1), "it has one input"),
    "factors of an image": (set_field(3, OTHER, 1), "its sizes differ"),
    "joined with one pixel": (set_field(4, OTHER, 2), "its sizes differ"),
    "joined signs": (set_field(4, OTHER, 5), "buffers have other types"),
    "joined channels": (set_buffers(2, 2 * CHANNELS, 2 * CHANNELS + 1), "its sizes differ"),
    "added by a mean": (set_field(1, OTHER, 2), "it cannot add"),
    "added by a sigmoid": (set_field(2, OTHER, 2), "it cannot add"),
    "shift": (set_field(3, SHIFT, 5), "its shifts or slopes have another size"),
    "shift of a mean": (set_field(1, SHIFT, 0), "its shifts or slopes have another size"),
    "slope of signs": (set_field(6, SLOPE, 5), "its shifts or slopes have another size"),
    "after": (set_field(5, AFTER, 99), "its shifts or slopes have another size"),
    "after of joined channels": (set_field(4, AFTER, 5), "its shifts or slopes have another size"),
    "shift of signs": (set_field(3, SIGN_SHIFT, 5), "its shifts of signs have another size"),
    "shift of no signs": (set_field(5, SIGN_SHIFT, 5), "its shifts of signs have another size"),
    "factor of signs": (set_field(6, FACTOR, 5), "its factors have another size"),
    "offset of signs": (set_field(6, OFFSET, 0), "its offsets have another size"),
    "filters": (set_field(5, WEIGHT, 0), "its weight has another size"),
    "window": (set_field(5, KERNEL_W, 1 << 13), "its window is damaged"),
    "channels of filters": (set_field(5, SOURCE, 1), "it changes the number of channels"),
    "padding": (set_field(5, LEFT, SIZE), "its padding is damaged"),
}


@pytest.mark.parametrize("name", NEWER)
def test_changed_programs_of_newer_operations_are_refused(name: str) -> None:
    check(newer(), *NEWER[name])


@pytest.mark.parametrize("name", CHANGES)
def test_changed_programs_are_refused(name: str) -> None:
    check(small(), *CHANGES[name])


def check(program: Program, change: Callable[[Tensors], object], sentence: str) -> None:
    """Change the tensors of a program that was accepted before."""
    tensors = tensors_of(program)
    tensors["buffers"][:, 4] = range(len(tensors["buffers"]))  # each has memory of its own
    load(content_of(tensors))
    change(tensors)
    with pytest.raises(ValueError, match=f"^the packed program is refused: {sentence}$"):
        load(content_of(tensors))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"format": 2}', "it is of another version of bitfleet"),
        ('{"x": {"format": 1}}', "it is of another version of bitfleet"),
        ("", "it is of another version of bitfleet"),
        ("{", "it is of another version of bitfleet"),
    ],
)
def test_other_descriptions_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(content_of(tensors_of(small()), text))


def edited(before: bytes, after: bytes) -> bytes:
    """Return the file of `small` with another header; tensors stay where they are."""
    content = to_bytes(small())
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    assert before in header
    header = header.replace(before, after, 1)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (b'"1":{', b'"0":{', "a tensor is there twice"),
        (b'"program"', b'"buffers"', "a tensor is there twice"),
        (b'"1":{', b'"1" :{', "a tensor is damaged or cut off"),  # not at a multiple of 4 bytes
        (b'"1":{', b'"1":[', "a tensor is damaged or cut off"),
        (b'{"bitfleet":"', b'{"bitfleet":"{}","bitfleet":"', "its metadata is damaged"),
        (b'\\"format', b"\\u12", "its metadata is damaged"),
        (b'\\"caf\\\\u00e9', b"\\u0000\\u00e9", "its metadata is damaged"),
        (b'\\"caf\\\\u00e9', b"\\ud800\\u00e9", "its metadata is damaged"),
    ],
)
def test_other_headers_are_refused(before: bytes, after: bytes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(edited(before, after))


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_files_cut_off_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="safetensors|cut off"):
        load(to_bytes(small())[:size])


def class_name(loaded: PackedNetwork, index: int, size: int = 64) -> str | None:
    name = ctypes.create_string_buffer(size)
    missing = library().packed_class_name(loaded._handle, index, name, ctypes.c_size_t(size))
    return None if missing else name.value.decode()


def test_names_of_classes() -> None:
    loaded = load(to_bytes(small()))
    assert [class_name(loaded, index) for index in range(5)] == CLASSES
    assert class_name(loaded, -1) is class_name(loaded, 5) is None
    assert [class_name(loaded, 2, size) for size in (1, 3, 4, 5, 6)] == ["", "ca", "caf", "caf", "caf\u00e9"]
    assert [class_name(loaded, 3, size) for size in (4, 5)] == ["", CLASSES[3]]
    assert class_name(load(content_of(tensors_of(small()))), 0) is None


def test_best_path_again() -> None:
    best = library().packed_path()
    assert library().packed_use_path(b"portable") == 0
    assert library().packed_path() == b"portable"
    assert library().packed_use_path(b"none") == -1
    assert library().packed_path() == b"portable"
    assert library().packed_use_path(None) == 0
    assert library().packed_path() == best
    assert best != b"portable" or library().packed_use_path(b"avx2") == -1


def test_many_threads() -> None:
    """More threads than rows, CPUs or memory for them give the same logits."""
    program = network("layer")
    runner, image = PackedNetwork(to_bytes(program), {}), random_image(program, 0)
    assert np.array_equal(runner(image[None], 1), runner(image[None], 1000))
    assert np.array_equal(runner(image[None], 1), runner(image[None], -5))
