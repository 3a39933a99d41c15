"""Turn a packed program into a QONNX model, for FINN, FINN+ and hls4ml.

As the ONNX model, but signs and binary weights are made by QONNX's BipolarQuant with scale 1.
BipolarQuant(x) is +1 where x >= 0 and -1 elsewhere, so an exact 0 becomes +1, as in the program:
nothing has to be shifted. A comparison sum * direction >= threshold is BipolarQuant(sum * direction
- threshold), whose argument is an integer.
"""

from typing import Any

import numpy as np

from bitfleet.packed.onnx_format import OnnxGraph
from bitfleet.packed.program import Array, Buffer, Program

DOMAIN = "qonnx.custom_op.general"


def to_qonnx(program: Program) -> bytes:
    """Return the QONNX model of `program`, for one image at a time, as its tools expect.

    Its input "pixels" is float32 [1, channels, height, width] on the scale 0..255, its output
    "logits" [1, classes].

    Args:
        program: from `lower`.

    Raises:
        ValueError: it has an operation that is unknown here.
    """
    return _QonnxGraph(program, np.float32).to_bytes()


class _QonnxGraph(OnnxGraph):
    opset = 11
    """The version that QONNX prefers."""
    batch = 1

    def sign(self, value: str, target: Buffer, threshold: Array | None = None) -> str:
        """Return the node of the signs."""
        if threshold is not None:
            value = self.node("Add", [value, self.channels("offset", -threshold)], target)
        return self.node("BipolarQuant", [value, self.scalar("one", 1)], target, domain=DOMAIN)

    def binary_weight(self, values: Array) -> str:
        """Return the node of a quantized weight."""
        source, scale = self.constant("weight", values), self.scalar("one", 1)
        name = f"{self.prefix}_bipolar_weight"
        helper: Any = self.onnx.helper
        self.nodes.append(helper.make_node("BipolarQuant", [source, scale], [name], name, domain=DOMAIN))
        self.shapes.append(helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, values.shape))
        return name
