"""Write the network of a run as an ONNX or QONNX model, and compare it with the network."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitfleet.launch.export.command import Export
from bitfleet.launch.export.export import compare, known, lower_trained, write
from bitfleet.launch.text import megabytes
from bitfleet.packed.onnx_format import LOGITS, OPSET, PIXELS, to_onnx
from bitfleet.packed.program import Array, Program, to_bytes
from bitfleet.packed.qonnx_format import to_qonnx


def export_onnx(options: Export, rest: Sequence[str]) -> str:
    """Write an ONNX model; arguments, result and errors as those of `export_packed`.

    The pixels are uint8, or float32 if the run's evaluation resizes to fractions.
    """
    _require("onnx", "onnx", "onnxruntime")
    output = options.output
    trained, program = lower_trained(options, rest)
    is_fractional = program.description["preprocessing"]["geometry"] == "official"
    dtype = np.float32 if is_fractional else np.uint8
    content = to_onnx(program, dtype)
    checked = compare(trained, OnnxNetwork(content, dtype), "the ONNX model")
    write(output, content)
    inputs = f'"{PIXELS}" {np.dtype(dtype)} [N, {_shape(program)}] on the scale 0..255'
    return "\n".join(
        [
            f"{output}: {megabytes(len(content))}, ONNX opset {OPSET}, {_bits(program)}",
            f'input {inputs}, output "{LOGITS}" float32 [N, {program.operations[-1].target.channels}]',
            *known(trained),
            f"{checked}, in onnxruntime",
        ]
    )


def export_qonnx(options: Export, rest: Sequence[str]) -> str:
    """Write a QONNX model; arguments, result and errors as those of `export_packed`."""
    _require("qonnx", "onnx", "onnxruntime", "qonnx")
    output = options.output
    trained, program = lower_trained(options, rest)
    content = to_qonnx(program)
    checked = compare(trained, QonnxNetwork(content), "the QONNX model")
    write(output, content)
    return "\n".join(
        [
            f"{output}: {megabytes(len(content))}, QONNX with BipolarQuant, {_bits(program)}",
            f'input "{PIXELS}" float32 [1, {_shape(program)}] on the scale 0..255, output "{LOGITS}" float32 '
            f"[1, {program.operations[-1].target.channels}]",
            *known(trained),
            f"{checked}, in qonnx",
        ]
    )


class OnnxNetwork:
    """An ONNX model in onnxruntime, on one thread.

    Args:
        content: of the file.
        dtype: of its pixels.
    """

    def __init__(self, content: bytes, dtype: type[np.generic]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session: Any = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._dtype = dtype

    def __call__(self, images: Array) -> Array:
        """Compute logits, float32 [N, classes], of images [N, height, width, channels]."""
        pixels = images.transpose(0, 3, 1, 2).astype(self._dtype)
        rows = [self._session.run([LOGITS], {PIXELS: pixel[None]})[0] for pixel in pixels]
        return np.concatenate(rows)


class QonnxNetwork:
    """A QONNX model in qonnx's executor, which runs a node at a time.

    Args:
        content: of the file.
    """

    def __init__(self, content: bytes) -> None:
        import onnx
        from qonnx.core.modelwrapper import ModelWrapper

        self._model: Any = ModelWrapper(onnx.load_from_string(content))

    def __call__(self, images: Array) -> Array:
        """Compute logits, float32 [N, classes], of images [N, height, width, channels]."""
        from qonnx.core.onnx_exec import execute_onnx

        pixels = images.transpose(0, 3, 1, 2).astype(np.float32)
        return np.concatenate([execute_onnx(self._model, {PIXELS: pixel[None]})[LOGITS] for pixel in pixels])


def _require(kind: str, *packages: str) -> None:
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ValueError(f"--format {kind} needs {' and '.join(missing)}: pip install 'bitfleet[export]'")


def _shape(program: Program) -> str:
    image = program.operations[0].source
    return f"{image.channels}, {image.height}, {image.width}"


def _bits(program: Program) -> str:
    bits = sum(o.weight.size for o in program.operations if o.weight is not None and o.weight.dtype == bool)
    return f"{bits:,} binary weights as float32; the packed format takes {megabytes(len(to_bytes(program)))}"
