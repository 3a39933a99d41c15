"""Turn a packed program into a C header and source file for microcontrollers.

C99: constant arrays, the kernels of device.c that the network needs, static buffers, and one
function. No memory is allocated and no library is needed (LayerNorm calls sqrt, a sigmoid expf).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bitfleet.packed.program import Array, Buffer, Flag, Kind, Operation, Program, Type, assign_slots

WIDTH = 120
"""Columns of the generated files."""


@dataclasses.dataclass(frozen=True)
class CSource:
    """The two files of a network, and what they take of a device."""

    stem: str
    """Name of the files without .h and .c."""
    name: str
    """Prefix of the names in the header."""
    header: str
    source: str
    constant_bytes: int
    """Arrays of weights and thresholds, in flash."""
    buffer_bytes: int
    """Buffers between operations, in RAM; the pixels and logits of the caller are not counted."""


def to_c(program: Program, stem: str) -> CSource:
    """Return the C files of `program`.

    The header declares `void NAME_run(const uint8_t *pixels, float *logits)` for one image
    [height][width][channels] on the scale 0..255, and the sizes.

    Args:
        program: from `lower`.
        stem: name of the files without .h and .c; NAME is the same with "_" for what C does not
            allow in names.

    Raises:
        ValueError: it has an operation that is unknown here.
    """
    return _Writer(program, stem).files()


class _Writer:
    def __init__(self, program: Program, stem: str) -> None:
        name = re.sub(r"\W", "_", stem, flags=re.ASCII)
        self.program, self.stem = program, stem
        self.name = name if re.match("[A-Za-z]", name) else f"network_{name}"
        self.constants: list[str] = []
        self.structs: list[str] = []
        self.calls: list[str] = []
        self.constant_bytes = 0
        self.index = 0
        buffers = [b for b in assign_slots(program.operations) if b is not program.operations[0].source]
        used = sorted({buffer.slot for buffer in buffers})
        self.slots = {slot: max(_elements(b) for b in buffers if b.slot == slot) for slot in used}
        for self.index, operation in enumerate(program.operations):
            self.call(operation)

    def call(self, o: Operation) -> None:
        makers: dict[Kind, Callable[[Operation], list[str]]] = {
            Kind.NORMALIZE: self.normalize,
            Kind.CONV: self.convolution,
            Kind.BINARY_CONV: self.binary_convolution,
            Kind.AFFINE: self.affine,
            Kind.ADD: self.affine,
            Kind.LAYER_NORM: self.layer_norm,
            Kind.MAX_POOL: self.max_pool,
            Kind.AVG_POOL: lambda o: ["average_pool", _slot(o.source), self.window(o), self.finish(o)],
            Kind.DEPTHWISE: self.depthwise,
            Kind.CONCAT: self.concatenation,
            Kind.SCALE: self.scale,
            Kind.SIGMOID: lambda o: ["sigmoid", *_image(o.source), self.finish(o)],
            Kind.SIGN: self.sign,
            Kind.THRESHOLD: lambda o: ["threshold_sums", *_image(o.source), *self.comparison(o)],
            Kind.MEAN: lambda o: ["mean", *_image(o.source), self.finish(o)],
        }
        if o.kind not in makers:
            raise ValueError(f"C files of bitfleet do not have the operation {o.kind.name} of the network")
        kernel, *arguments = makers[o.kind](o)
        self.calls.append(f"{kernel}({', '.join([*arguments, _slot(o.target)])});")

    def normalize(self, o: Operation) -> list[str]:
        assert o.offset is not None
        assert o.factor is not None
        mean, deviation = self.floats("mean", o.offset), self.floats("deviation", o.factor)
        return ["normalize", "pixels", *_image(o.source)[1:], mean, deviation, self.finish(o)]

    def convolution(self, o: Operation) -> list[str]:
        assert o.weight is not None
        outputs = o.target.channels
        rows = o.weight.transpose(2, 0, 1).reshape(outputs, -1)
        if rows.dtype == bool:
            return ["conv_of_signs", _slot(o.source), self.bits(rows), self.window(o), self.finish(o)]
        return ["conv", _slot(o.source), self.floats("weight", rows), self.window(o), self.finish(o)]

    def binary_convolution(self, o: Operation) -> list[str]:
        assert o.weight is not None
        rows = self.bits(o.weight.reshape(-1, o.source.channels))
        inputs = [_slot(o.source), rows, self.window(o)]
        if o.target.type is Type.SIGNS:
            return ["binary_conv_to_signs", *inputs, *self.comparison(o)]
        if o.target.type is Type.SUMS:
            return ["binary_conv_to_sums", *inputs]
        return ["binary_conv", *inputs, self.finish(o)]

    def depthwise(self, o: Operation) -> list[str]:
        assert o.weight is not None
        return ["depthwise", _slot(o.source), self.floats("weight", o.weight), self.window(o), self.finish(o)]

    def concatenation(self, o: Operation) -> list[str]:
        assert o.other is not None
        source, *sizes = _image(o.source)
        return ["concatenate", source, _slot(o.other), *sizes, str(o.other.channels), self.finish(o)]

    def scale(self, o: Operation) -> list[str]:
        assert o.other is not None
        source, *sizes = _image(o.source)
        is_sums = str(int(o.source.type is Type.SUMS))
        return ["scale", source, is_sums, _slot(o.other), *sizes, self.finish(o)]

    def sign(self, o: Operation) -> list[str]:
        if o.offset is None:
            return ["sign", *_image(o.source)]
        return ["sign_after_offset", *_image(o.source), self.floats("offset", o.offset)]

    def affine(self, o: Operation) -> list[str]:
        kernel = "affine_of_sums" if o.source.type is Type.SUMS else "affine"
        return [kernel, *_image(o.source), self.finish(o)]

    def layer_norm(self, o: Operation) -> list[str]:
        source, *sizes = _image(o.source)
        is_sums = str(int(o.source.type is Type.SUMS))
        return ["layer_norm", source, is_sums, *sizes, _literal(o.real), self.finish(o)]

    def max_pool(self, o: Operation) -> list[str]:
        if o.source.type is Type.SUMS:
            return ["max_pool_of_sums", _slot(o.source), self.window(o)]
        return ["max_pool", _slot(o.source), self.window(o), self.finish(o)]

    def comparison(self, o: Operation) -> list[str]:
        assert o.factor is not None
        assert o.offset is not None
        threshold = self.array("threshold", "int32_t", map(str, o.factor.tolist()), 4 * o.factor.size)
        return [threshold, self.array("direction", "int8_t", map(str, o.offset.tolist()), o.offset.size)]

    def window(self, o: Operation) -> str:
        s, t = o.source, o.target
        sizes = (s.height, s.width, s.channels, *o.kernel, o.stride, o.top, o.left, t.height, t.width, t.channels)
        padding_counts = bool(o.flags & (Flag.PAD_ONES | Flag.COUNT_PADDING))
        return self.struct("window", map(str, (*sizes, int(padding_counts))))

    def finish(self, o: Operation) -> str:
        is_map = o.kind is not Kind.NORMALIZE  # whose factor and offset are deviation and mean
        is_sum = o.kind not in (Kind.SCALE, Kind.CONCAT)

        def floats(role: str, values: Array | None) -> str:
            return "0" if values is None else self.floats(role, values)

        fields = [
            str(int(Flag.RELU_FIRST in o.flags)),
            floats("factor", o.factor if is_map else None),
            floats("offset", o.offset if is_map else None),
            "0" if o.other is None or not is_sum else _slot(o.other),
            floats("shift", o.shift),
            str(int(Flag.RELU in o.flags)),
            floats("slope", o.slope),
            floats("after", o.after),
            "0" if o.signs is None else _slot(o.signs),
            floats("sign_shift", o.sign_shift),
        ]
        return self.struct("finish", fields)

    def struct(self, kind: str, fields: Iterable[str]) -> str:
        self.structs.append(f"static const struct {kind} {kind}_{self.index} = {{{', '.join(fields)}}};")
        return f"&{kind}_{self.index}"

    def floats(self, role: str, values: Array) -> str:
        return self.array(role, "float", map(_literal, values.reshape(-1).tolist()), 4 * values.size)

    def bits(self, rows: Array) -> str:
        """Rows of bool, each in whole words."""
        padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32)))
        words = np.packbits(padded, axis=1, bitorder="little").reshape(-1).view("<u4")
        return self.array("weight", "uint32_t", map("0x{:08x}u".format, words.tolist()), 4 * words.size)

    def array(self, role: str, kind: str, literals: Iterable[str], num_bytes: int) -> str:
        name = f"{role}_{self.index}"
        self.constant_bytes += num_bytes
        self.constants.append(f"static const {kind} {name}[] = {{\n{_lines(literals)}\n}};")
        return name

    def files(self) -> CSource:
        buffer_bytes = 4 * sum(self.slots.values())
        last = self.program.operations[-1].target
        body = "\n    ".join(self.calls)
        run = (
            f"void {self.name}_run(const uint8_t *pixels, float *logits)\n{{\n    {body}\n"
            f"    for (int32_t i = 0; i < {_elements(last)}; i++) logits[i] = {_slot(last)}[i].real;\n}}"
        )
        kernels = needed_kernels(run)
        text = [
            "/* Written by bitfleet export; the header says what it is. */",
            f'#include "{self.stem}.h"' + ("\n#include <math.h>" if re.search(r"(layer_norm|sigmoid)\(", run) else ""),
            *kernels,
            *self.constants,
            "\n".join(f"static union value slot_{slot}[{size}];" for slot, size in self.slots.items()),
            "\n".join(self.structs),
            run,
        ]
        source = "\n\n".join(text) + "\n"
        return CSource(self.stem, self.name, self.header(buffer_bytes), source, self.constant_bytes, buffer_bytes)

    def header(self, buffer_bytes: int) -> str:
        image, upper = self.program.operations[0].source, self.name.upper()
        sizes = {
            "HEIGHT": image.height,
            "WIDTH": image.width,
            "CHANNELS": image.channels,
            "NUM_LOGITS": _elements(self.program.operations[-1].target),
        }
        defines = "\n".join(f"#define {upper}_{key} {value}" for key, value in sizes.items())
        return (
            f"/* Written by bitfleet export: {self.constant_bytes:,} bytes of constants, {buffer_bytes:,} of buffers.\n"
            f" * {_comment(self.program.description)} */\n"
            f"#ifndef {upper}_H\n#define {upper}_H\n#include <stdint.h>\n\n{defines}\n\n"
            '#ifdef __cplusplus\nextern "C" {\n#endif\n'
            "/* Compute the logits of one image, [height][width][channels] on the scale 0..255.\n"
            " * Not from two threads at once: the buffers are static. */\n"
            f"void {self.name}_run(const uint8_t *pixels, float *logits);\n"
            "#ifdef __cplusplus\n}\n#endif\n#endif\n"
        )


def needed_kernels(code: str) -> list[str]:
    """Return the parts of device.c that `code` uses, and those that they use, in order."""
    _, *parts = Path(__file__).with_name("device.c").read_text().strip().split("\n\n")
    wanted: set[int] = set()
    pending = [code]
    while pending:
        user = pending.pop()
        found = {i for i, part in enumerate(parts) if re.search(_use_of(part), user)} - wanted
        wanted |= found
        pending += [parts[i] for i in found]
    return [parts[i] for i in sorted(wanted)]


def _use_of(part: str) -> str:
    """Return a pattern for uses of the type or function that `part` defines."""
    if found := re.search(r"^(struct|union) (\w+) \{", part, re.MULTILINE):
        return rf"\b{found[1]} {found[2]}\b"
    found = re.search(r"^static \w+ (\w+)\(", part, re.MULTILINE)
    assert found, f"device.c has a part without a name: {part}"
    return rf"\b{found[1]}\("


def _elements(buffer: Buffer) -> int:
    """Return its number of floats, sums or words."""
    channels = (buffer.channels + 31) // 32 if buffer.type is Type.SIGNS else buffer.channels
    return buffer.height * buffer.width * channels


def _slot(buffer: Buffer) -> str:
    return f"slot_{buffer.slot}"


def _image(buffer: Buffer) -> list[str]:
    """Return the arguments buffer, number of pixels, channels."""
    return [_slot(buffer), str(buffer.height * buffer.width), str(buffer.channels)]


def _literal(value: float) -> str:
    """Return a float32 as C reads it back exactly."""
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _lines(literals: Iterable[str]) -> str:
    """Return a list of numbers in lines of one width."""
    lines: list[str] = []
    line = "   "
    for literal in literals:
        if len(line) + len(literal) + 2 > WIDTH:
            lines.append(line)
            line = "   "
        line += f" {literal},"
    return "\n".join([*lines, line])


def _comment(description: dict[str, Any]) -> str:
    """Return a description as a line of a comment, which it cannot end."""
    return re.sub(r"[*\\?]", "_", json.dumps(description))
