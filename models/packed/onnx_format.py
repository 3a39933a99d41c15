"""Turn a packed program into an ONNX model that ONNX Runtime, OpenVINO, TensorRT, ... run.

Binary weights and signs are float32 +-1. A sign is Where(Less(x, 0), -1, 1), because ONNX's
Sign(0) is 0; where the program compares an integer sum with a threshold, so does the model. Signs
are padded with zeros, which are no products, or by a node with ones.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bitfleet.packed.program import Array, Buffer, Flag, Kind, Operation, Program, Type

PIXELS, LOGITS = "pixels", "logits"
"""Names of input and output."""
OPSET, IR_VERSION = 21, 10
"""Versions of ONNX 1.16 (2024); the operators used here have not changed since."""


def to_onnx(program: Program, dtype: type[np.generic] = np.uint8) -> bytes:
    """Return the ONNX model of `program`, float32 inside, for batches of any size.

    Its input "pixels" is [N, channels, height, width] on the scale 0..255, its output "logits"
    [N, classes]; the property "bitfleet" is the description of the program as JSON.

    Args:
        program: from `lower`.
        dtype: of the pixels, np.uint8 or np.float32.

    Raises:
        ValueError: it has an operation that is unknown here.
    """
    return OnnxGraph(program, dtype).to_bytes()


class OnnxGraph:
    """Nodes of an ONNX graph, made operation by operation; images are [N, channels, height, width].

    Args:
        program: from `lower`.
        dtype: of the pixels.
    """

    opset = OPSET
    batch: int | str = "N"

    def __init__(self, program: Program, dtype: type[np.generic]) -> None:
        import onnx

        self.onnx = onnx
        self.description = program.description
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.shapes: list[Any] = []
        self.names: dict[int, str] = {}
        first, last = program.operations[0], program.operations[-1]
        self.input = self.tensor(PIXELS, first.source, dtype)
        self.names[id(first.source)] = PIXELS
        if dtype != np.float32:
            self.prefix = "cast"
            to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
            self.names[id(first.source)] = self.node("Cast", [PIXELS], first.source, to=to)
        for index, operation in enumerate(program.operations):
            self.prefix = f"{index}_{operation.kind.name.lower()}"
            self.add(operation)
        self.nodes.append(onnx.helper.make_node("Flatten", [self.names[id(last.target)]], [LOGITS], LOGITS))
        shape = [self.batch, last.target.channels]
        self.output = onnx.helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, shape)

    def to_bytes(self) -> bytes:
        """Return the model as the content of a file."""
        helper = self.onnx.helper
        initializers = list(self.initializers.values())
        graph = helper.make_graph(
            self.nodes, "bitfleet", [self.input], [self.output], initializers, value_info=self.shapes
        )
        domains = sorted({node.domain for node in self.nodes})
        opsets = [helper.make_opsetid(domain, 1 if domain else self.opset) for domain in domains]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="bitfleet")
        helper.set_model_props(model, {"bitfleet": json.dumps(self.description)})
        content: bytes = model.SerializeToString()
        return content

    def add(self, operation: Operation) -> None:
        """Append the nodes of one operation."""
        makers: dict[Kind, Callable[[Operation], str]] = {
            Kind.NORMALIZE: self.normalize,
            Kind.CONV: self.convolution,
            Kind.BINARY_CONV: self.convolution,
            Kind.AFFINE: self.source,
            Kind.ADD: self.source,
            Kind.LAYER_NORM: self.layer_norm,
            Kind.MAX_POOL: self.pool,
            Kind.AVG_POOL: self.pool,
            Kind.DEPTHWISE: self.depthwise,
            Kind.CONCAT: lambda o: self.node("Concat", [self.source(o), self.other(o)], o.target, axis=1),
            Kind.SIGMOID: lambda o: self.node("Sigmoid", [self.source(o)], o.target),
            Kind.SCALE: lambda o: self.node("Mul", [self.source(o), self.other(o)], o.target),
            Kind.SIGN: self.shifted_source,
            Kind.THRESHOLD: self.source,
            Kind.MEAN: lambda o: self.node("GlobalAveragePool", [self.source(o)], o.target),
        }
        if operation.kind not in makers:
            raise ValueError(f"ONNX models of bitfleet do not have the operation {operation.kind.name} of the network")
        value = makers[operation.kind](operation)
        target = operation.target
        if target.type is Type.SIGNS:
            value = self.signs_of_sums(value, operation)
        elif operation.kind is not Kind.NORMALIZE:
            value = self.finish(value, operation)
        self.names[id(target)] = value
        if operation.signs is not None:
            value = self.offset("sign_shift", value, operation.sign_shift, operation.signs)
            self.names[id(operation.signs)] = self.sign(value, operation.signs)

    def finish(self, value: str, operation: Operation) -> str:
        """Append the steps of a result, in their order."""
        target = operation.target
        if Flag.RELU_FIRST in operation.flags:
            value = self.node("Relu", [value], target)
        if operation.factor is not None:
            value = self.node("Mul", [value, self.channels("factor", operation.factor)], target)
        value = self.offset("offset", value, operation.offset, target)
        if operation.other is not None and operation.kind not in (Kind.SCALE, Kind.CONCAT):
            value = self.node("Add", [value, self.other(operation)], target)
        value = self.offset("shift", value, operation.shift, target)
        if Flag.RELU in operation.flags:
            value = self.node("Relu", [value], target)
        if operation.slope is not None:
            value = self.node("PRelu", [value, self.constant("slope", operation.slope.reshape(-1, 1, 1))], target)
        return self.offset("after", value, operation.after, target)

    def offset(self, name: str, value: str, offset: Array | None, target: Buffer) -> str:
        """Return the sum of `value` and an offset per channel, if there is one."""
        return value if offset is None else self.node("Add", [value, self.channels(name, offset)], target)

    def other(self, operation: Operation) -> str:
        """Return the second tensor that an operation reads."""
        assert operation.other is not None
        return self.names[id(operation.other)]

    def shifted_source(self, operation: Operation) -> str:
        """Return the tensor whose signs are taken."""
        return self.offset("offset", self.source(operation), operation.offset, operation.target)

    def source(self, operation: Operation) -> str:
        """Return the tensor that an operation reads."""
        return self.names[id(operation.source)]

    def normalize(self, operation: Operation) -> str:
        """(pixels - mean) / deviation."""
        assert operation.factor is not None
        assert operation.offset is not None
        mean, deviation = self.channels("mean", operation.offset), self.channels("deviation", operation.factor)
        value = self.node("Sub", [self.source(operation), mean], operation.target)
        return self.node("Div", [value, deviation], operation.target)

    def convolution(self, operation: Operation) -> str:
        """Multiply and add floats, or signs, whose sums are integers that float32 holds exactly."""
        o, weight = operation, operation.weight
        assert weight is not None
        outputs, channels = o.target.channels, o.source.channels
        shaped = weight.reshape(outputs, -1, channels) if o.kind is Kind.BINARY_CONV else weight.transpose(2, 0, 1)
        values = shaped.transpose(0, 2, 1).reshape(outputs, channels, *o.kernel)
        if values.dtype == bool:
            name = self.binary_weight(np.where(values, np.float32(1), np.float32(-1)))
        else:
            name = self.constant("weight", values)
        source, window = self.source(o), _window(o)
        if Flag.PAD_ONES in o.flags:
            top, left, bottom, right = window["pads"]
            pads = self.constant("pads", np.array([0, 0, top, left, 0, 0, bottom, right], np.int64))
            height, width = o.source.height + top + bottom, o.source.width + left + right
            padded = dataclasses.replace(o.source, height=height, width=width)
            source = self.node("Pad", [source, pads, self.scalar("one", 1)], padded)
            window["pads"] = [0] * 4
        return self.node("Conv", [source, name], o.target, **window)

    def depthwise(self, operation: Operation) -> str:
        """Convolve each channel with its filter."""
        o, channels = operation, operation.target.channels
        assert o.weight is not None
        name = self.constant("weight", o.weight.T.reshape(channels, 1, *o.kernel))
        return self.node("Conv", [self.source(o), name], o.target, group=channels, **_window(o))

    def layer_norm(self, operation: Operation) -> str:
        """Normalize over the channels of each pixel."""
        source, target = operation.source, operation.target
        one = dataclasses.replace(source, channels=1)
        centred = self.node("Sub", [self.source(operation), self.mean_of_channels(self.source(operation), one)], target)
        variance = self.mean_of_channels(self.node("Mul", [centred, centred], target), one)
        epsilon = self.constant("epsilon", np.asarray(operation.real, np.float32))
        deviation = self.node("Sqrt", [self.node("Add", [variance, epsilon], one)], one)
        return self.node("Mul", [centred, self.node("Reciprocal", [deviation], one)], target)

    def mean_of_channels(self, value: str, target: Buffer) -> str:
        """Return the mean over the channels of each pixel."""
        if self.opset < 18:
            return self.node("ReduceMean", [value], target, axes=[1])
        return self.node("ReduceMean", [value, self.constant("axes", np.array([1], np.int64))], target)

    def pool(self, operation: Operation) -> str:
        """Maximum or mean of the pixels inside the image."""
        attributes, kind = _window(operation), "MaxPool"
        if operation.kind is Kind.AVG_POOL:
            kind, attributes["count_include_pad"] = "AveragePool", int(Flag.COUNT_PADDING in operation.flags)
        return self.node(kind, [self.source(operation)], operation.target, **attributes)

    def signs_of_sums(self, value: str, operation: Operation) -> str:
        """Return +1 exactly where value * direction >= threshold; SIGN has neither."""
        if operation.kind is Kind.SIGN or operation.factor is None or operation.offset is None:
            return self.sign(value, operation.target)
        if (operation.offset != 1).any():
            value = self.node("Mul", [value, self.channels("direction", operation.offset)], operation.target)
        return self.sign(value, operation.target, operation.factor)

    def sign(self, value: str, target: Buffer, threshold: Array | None = None) -> str:
        """Return +1 where `value` is not below `threshold`, per channel (None: 0), else -1."""
        bound = self.scalar("zero", 0) if threshold is None else self.channels("threshold", threshold)
        below = self.node("Less", [value, bound], target, self.onnx.TensorProto.BOOL)
        return self.node("Where", [below, self.scalar("minus_one", -1), self.scalar("one", 1)], target)

    def binary_weight(self, values: Array) -> str:
        """Return the tensor of a weight of +-1."""
        return self.constant("weight", values)

    def node(self, kind: str, inputs: Sequence[str], target: Buffer, dtype: int = 1, **attributes: Any) -> str:
        """Append a node whose output, of the size of `target`, is returned."""
        name = f"{self.prefix}_{kind.lower()}"
        others = sum(node.name.startswith(name) for node in self.nodes)
        name += f"_{others + 1}" if others else ""
        domain = attributes.pop("domain", "")
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, domain=domain, **attributes))
        shape = [self.batch, target.channels, target.height, target.width]
        self.shapes.append(self.onnx.helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, name: str, values: Array) -> str:
        """Return the name of a constant of this operation."""
        name = f"{self.prefix}_{name}"
        self.initializers[name] = self.onnx.numpy_helper.from_array(values.copy(order="C"), name)
        return name

    def scalar(self, name: str, value: float) -> str:
        """Return the name of a constant that operations share."""
        self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(value, np.float32), name)
        return name

    def channels(self, name: str, values: Array) -> str:
        """Return the name of a constant per channel."""
        return self.constant(name, values.astype(np.float32).reshape(1, -1, 1, 1))

    def tensor(self, name: str, buffer: Buffer, dtype: type[np.generic]) -> Any:
        """Return the description of a tensor."""
        shape = [self.batch, buffer.channels, buffer.height, buffer.width]
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.onnx.helper.make_tensor_value_info(name, kind, shape)


def _window(o: Operation) -> dict[str, Any]:
    """Return the attributes of a convolution or pool.

    Rows that no window reaches would be a negative padding; ONNX leaves them out without it.
    """
    bottom = (o.target.height - 1) * o.stride + o.kernel[0] - o.source.height - o.top
    right = (o.target.width - 1) * o.stride + o.kernel[1] - o.source.width - o.left
    pads = [o.top, o.left, max(bottom, 0), max(right, 0)]
    return {"kernel_shape": o.kernel, "strides": [o.stride] * 2, "pads": pads}
