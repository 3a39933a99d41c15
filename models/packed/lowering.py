"""Lower a trained network to a packed program.

`torch.export` gives the operators of a forward pass; each becomes an operation, or part of the one
before. Signs after a batch normalization of sums become comparisons of integers, whose thresholds
are found by evaluating the normalization as torch does, so they are exact.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from bitfleet.packed.program import Array, Buffer, Flag, Kind, Operation, Program, Type

ALWAYS = 1 << 30
"""A threshold beyond every sum of products."""


def lower(
    model: nn.Module,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    description: dict[str, Any] | None = None,
) -> Program:
    """Return the program of `model` in evaluation mode, for images of `image_size` pixels a side.

    Args:
        model: on the CPU; its binary weights have the attribute `binary` and are +-1.
        image_size: height and width.
        mean: of the channels, on the scale 0..255.
        std: of the channels, on the scale 0..255.
        description: what the file says of itself.

    Raises:
        ValueError: it has an operator that a program cannot hold, or weights that are not finite.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the network cannot be exported: values of {name} are not finite")
        if getattr(tensor, "binary", False) and not (tensor.abs() == 1).all():
            raise ValueError(f"the network cannot be exported: weights of {name} are not +-1: train at least one step")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            exported = torch.export.export(model, (torch.zeros(1, 3, image_size, image_size),))
        operations = _Lowering(model, exported, image_size, mean, std).run()
    finally:
        model.train(was_training)
    return Program(_fuse(operations), dict(description or {}))


class _Value:
    """Result of a node: a buffer, with what has been done to it that needs no operation."""

    def __init__(self, buffer: Buffer, *, padding: Sequence[int] = (0, 0, 0, 0), steps: int = 0) -> None:
        self.buffer, self.padding, self.steps = buffer, tuple(padding), steps
        self.is_flat = False


class _Lowering:
    def __init__(
        self, model: nn.Module, exported: Any, image_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.graph = exported.graph
        self.operations: list[Operation] = []
        self.values: dict[Node, _Value | Tensor] = {}
        self.binary = {name for name, param in model.named_parameters() if getattr(param, "binary", False)}
        self.binary_nodes: set[Node] = set()
        signature = exported.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {**exported.state_dict, **exported.constants}
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                self.values[node] = constants[names[node.name]].detach()
                if names[node.name] in self.binary:
                    self.binary_nodes.add(node)
            else:
                image = Buffer(image_size, image_size, 3)
                normalized = Buffer(image_size, image_size, 3)
                self.add(Operation(Kind.NORMALIZE, image, normalized, factor=_row(std), offset=_row(mean)))
                self.values[node] = _Value(normalized)

    def add(self, operation: Operation) -> Buffer:
        self.operations.append(operation)
        return operation.target

    def run(self) -> list[Operation]:
        handlers: dict[str, Callable[..., _Value | Tensor]] = {
            "conv2d": self.conv2d,
            "linear": self.linear,
            "binary_conv2d": self.binary_conv2d,
            "batch_norm": self.batch_norm,
            "layer_norm": self.layer_norm,
            "max_pool2d": self.max_pool2d,
            "avg_pool2d": self.avg_pool2d,
            "sgn": self.sgn,
            "add": self.sum_of,
            "mul": self.product_of,
            "pad": self.pad,
            "mean": self.mean,
            "adaptive_avg_pool2d": self.adaptive_avg_pool2d,
            "relu": self.relu,
            "flatten": self.flatten,
        }
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            arguments: list[Any] = [self.values.get(arg, arg) if isinstance(arg, Node) else arg for arg in node.args]
            if node.op == "output":
                (result,) = node.args[0]
                last = self.values[result]
                assert isinstance(last, _Value)
                logits = self.as_floats(last.buffer)
                if (logits.height, logits.width) != (1, 1):
                    raise ValueError("the network cannot be exported: its result is not a row of logits")
                return self.operations
            if node.target is operator.getitem:  # of binary_conv2d: the result, and what backward needs
                if node.args[1] == 0:
                    self.values[node] = arguments[0]
                continue
            in_place = node.target._schema.name.endswith("_")
            name = node.target._schema.name.partition("::")[2].removesuffix("_")
            if isinstance(arguments[0], Tensor) and name in ("view", "reshape", "flatten", "unsqueeze"):
                self.values[node] = arguments[0]  # a weight in another shape, which its reader gives it
                if node.args[0] in self.binary_nodes:
                    self.binary_nodes.add(node)
            elif name not in handlers:
                self.values[node] = self.view(name, node, arguments)
            else:
                self.node = node
                self.values[node] = handlers[name](*arguments, **node.kwargs)
                if in_place:  # what reads the changed tensor later
                    self.values[node.args[0]] = self.values[node]
        raise AssertionError("a graph without output")

    def view(self, name: str, node: Node, arguments: list[Any]) -> _Value:
        source = arguments[0]
        shape = tuple(node.meta["val"].shape)
        if name in ("movedim", "dropout", "contiguous") or (name in ("unsqueeze", "view", "reshape") and shape[0] == 1):
            before = source.buffer.height * source.buffer.width
            if name in ("view", "reshape") and before > 1 and len(shape) == 2:
                return self.flatten(source)
            if name not in ("view", "reshape") or before == 1:
                return _Value(source.buffer)
        raise ValueError(f"the network cannot be exported: it uses {name}, which programs do not have")

    def floats_or_sums(self, source: _Value) -> Buffer:
        assert source.padding == (0, 0, 0, 0), "padding before something else than a convolution"
        return source.buffer

    def conv2d(
        self,
        source: _Value,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> _Value:
        if groups != 1 or set(dilation) != {1} or len(set(stride)) != 1:
            raise ValueError(
                "the network cannot be exported: it has a grouped, dilated or unevenly strided convolution"
            )
        left, right, top, bottom = source.padding
        vertical, horizontal = padding[0], padding[-1]
        pads = (left + horizontal, right + horizontal, top + vertical, bottom + vertical)
        return self.convolution(source.buffer, weight, bias, stride[0], pads, self.is_binary(1))

    def is_binary(self, argument: int) -> bool:
        return self.node.args[argument] in self.binary_nodes

    def convolution(
        self,
        source: Buffer,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: Sequence[int],
        is_binary: bool,
    ) -> _Value:
        left, right, top, bottom = padding
        outputs, channels, *kernel = weight.shape
        height = (source.height + top + bottom - kernel[0]) // stride + 1
        width = (source.width + left + right - kernel[1]) // stride + 1
        common: dict[str, Any] = {"kernel": tuple(kernel), "stride": stride, "top": top, "left": left}
        offset = None if bias is None else bias.numpy().astype(np.float32)
        if source.type is Type.SIGNS:
            if not is_binary:
                raise ValueError("the network cannot be exported: it multiplies signs by weights that are not binary")
            signs = (weight > 0).permute(0, 2, 3, 1).reshape(outputs, -1, channels).numpy()
            target = Buffer(height, width, outputs, Type.SUMS)
            self.add(Operation(Kind.BINARY_CONV, source, target, weight=signs, **common))
            if offset is not None:
                sums, target = target, Buffer(height, width, outputs)
                self.add(Operation(Kind.AFFINE, sums, target, offset=offset))
            return _Value(target)
        values = weight.permute(2, 3, 1, 0).reshape(-1, channels, outputs).numpy()
        flags = Flag.BINARY_WEIGHT if is_binary else Flag.NONE
        stored = values > 0 if is_binary else values.astype(np.float32)
        target = Buffer(height, width, outputs)
        self.add(Operation(Kind.CONV, source, target, weight=stored, offset=offset, flags=flags, **common))
        return _Value(target)

    def binary_conv2d(self, source: _Value, weight: Tensor, layer: Sequence[int], dtype: Any) -> _Value:
        stride, left, right, top, bottom = layer[8:13]
        return self.convolution(
            self.sign(source.buffer), weight, None, stride, (left, right, top, bottom), self.is_binary(1)
        )

    def linear(self, source: _Value, weight: Tensor, bias: Tensor | None = None) -> _Value:
        buffer = source.buffer
        shaped = weight.reshape(weight.shape[0], buffer.channels, buffer.height, buffer.width)
        return self.convolution(buffer, shaped, bias, 1, (0, 0, 0, 0), self.is_binary(1))

    def affine(self, source: Buffer, factor: Array | None, offset: Array | None) -> _Value:
        target = Buffer(source.height, source.width, source.channels)
        return _Value(self.add(Operation(Kind.AFFINE, source, target, factor=factor, offset=offset)))

    def batch_norm(
        self,
        source: _Value,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        cudnn: bool,
    ) -> _Value:
        assert not training
        factor = 1 / torch.sqrt(variance + eps)
        if weight is not None:
            factor = factor * weight
        offset = (torch.zeros_like(mean) if bias is None else bias) - mean * factor
        return self.affine(self.floats_or_sums(source), factor.numpy(), offset.numpy())

    def layer_norm(
        self, source: _Value, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, _: bool
    ) -> _Value:
        buffer = self.floats_or_sums(source)
        if list(shape) != [buffer.channels]:
            raise ValueError("the network cannot be exported: a LayerNorm is not over channels")
        target = Buffer(buffer.height, buffer.width, buffer.channels)
        factor, offset = (None if value is None else value.numpy() for value in (weight, bias))
        return _Value(self.add(Operation(Kind.LAYER_NORM, buffer, target, factor=factor, offset=offset, real=eps)))

    def pool(
        self, kind: Kind, source: _Value, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> _Value:
        buffer, shape = self.floats_or_sums(source), self.node.meta["val"].shape
        if len(set(stride)) != 1:
            raise ValueError("the network cannot be exported: it has an unevenly strided pool")
        target = Buffer(shape[2], shape[3], buffer.channels, buffer.type)
        operation = Operation(
            kind, buffer, target, kernel=(kernel[0], kernel[-1]), stride=stride[0], top=padding[0], left=padding[-1]
        )
        return _Value(self.add(operation))

    def max_pool2d(
        self,
        source: _Value,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        ceil_mode: bool = False,
    ) -> _Value:
        if set(dilation) != {1}:
            raise ValueError("the network cannot be exported: it has a dilated pool")
        return self.pool(Kind.MAX_POOL, source, kernel, stride or kernel, padding)

    def avg_pool2d(
        self,
        source: _Value,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0, 0),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> _Value:
        if divisor is not None or (count_include_pad and (any(padding) or ceil_mode)):
            raise ValueError("the network cannot be exported: a mean counts pixels outside of the image")
        return self.pool(Kind.AVG_POOL, source, kernel, stride or kernel, padding)

    def sgn(self, source: _Value) -> _Value:
        """sgn(sgn(x) + 0.1): the first is a step on the way, the second the sign."""
        if source.steps == 2:
            return _Value(self.sign(source.buffer))
        return _Value(source.buffer, steps=1)

    def sign(self, source: Buffer) -> Buffer:
        target = Buffer(source.height, source.width, source.channels, Type.SIGNS)
        if source.type is Type.SUMS:
            source = self.affine(source, None, None).buffer
        return self.add(Operation(Kind.SIGN, source, target))

    def sum_of(self, first: Any, second: Any) -> _Value:
        if isinstance(first, Tensor):
            first, second = second, first
        if isinstance(second, float) and first.steps == 1 and second == 0.1:
            return _Value(first.buffer, steps=2)
        if isinstance(second, Tensor):
            return self.affine(first.buffer, None, second.reshape(-1).numpy())
        if not isinstance(second, _Value):
            raise ValueError(f"the network cannot be exported: it adds {second}")
        one, other = (self.as_floats(value.buffer) for value in (first, second))
        target = Buffer(one.height, one.width, one.channels)
        return _Value(self.add(Operation(Kind.ADD, one, target, other=other)))

    def as_floats(self, buffer: Buffer) -> Buffer:
        return self.affine(buffer, None, None).buffer if buffer.type is Type.SUMS else buffer

    def product_of(self, first: Any, second: Any) -> _Value:
        if isinstance(first, Tensor):
            first, second = second, first
        if not isinstance(second, Tensor):
            raise ValueError(f"the network cannot be exported: it multiplies by {second}")
        return self.affine(first.buffer, second.reshape(-1).numpy(), None)

    def pad(self, source: _Value, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> _Value:
        if mode != "constant" or value or len(padding) != 4:
            raise ValueError("the network cannot be exported: it pads with something else than zeros")
        return _Value(source.buffer, padding=padding)

    def mean(self, source: _Value, dimensions: Sequence[int], keepdim: bool = False) -> _Value:
        if sorted(d % 4 for d in dimensions) != [2, 3]:
            raise ValueError("the network cannot be exported: a mean is not over all pixels")
        buffer = self.as_floats(source.buffer)
        return _Value(self.add(Operation(Kind.MEAN, buffer, Buffer(1, 1, buffer.channels))))

    def adaptive_avg_pool2d(self, source: _Value, size: int | Sequence[int]) -> _Value:
        if any(side != 1 for side in ([size] if isinstance(size, int) else size)):
            raise ValueError("the network cannot be exported: it has an adaptive pool to more than one pixel")
        return self.mean(source, (2, 3))

    def relu(self, source: _Value) -> _Value:
        target = Buffer(source.buffer.height, source.buffer.width, source.buffer.channels)
        return _Value(self.add(Operation(Kind.AFFINE, source.buffer, target, flags=Flag.RELU)))

    def flatten(self, source: _Value, start: int = 1, end: int = -1) -> _Value:
        if start != 1:
            raise ValueError("the network cannot be exported: it flattens some of an image's dimensions")
        return _Value(source.buffer)


def _row(values: Sequence[float]) -> Array:
    return np.asarray(values, np.float32)


def _fuse(operations: list[Operation]) -> list[Operation]:
    """Merge operations into the ones whose only readers they are, in the order of the operators."""
    fused: list[Operation] = []
    for operation in operations:
        maker = _maker(fused, operation.source)
        producer = maker if _readers(operations, operation.source) == 1 else None
        if operation.kind is Kind.AFFINE and producer is not None and _takes_affine(producer, operation):
            producer.factor = operation.factor if producer.factor is None else producer.factor
            producer.offset = operation.offset if producer.offset is None else producer.offset
            producer.flags |= operation.flags
            producer.target = operation.target
        elif operation.kind is Kind.ADD and (adder := _adder(operations, fused, operation)) is not None:
            adder.other = operation.other if adder.target is operation.source else operation.source
            adder.target = operation.target
            fused.remove(adder)  # after what it adds
            fused.append(adder)
        elif operation.kind is Kind.SIGN and producer is not None and _is_affine_of_sums(producer):
            _compare_sums(producer, operation.target)
        elif operation.kind is Kind.SIGN and maker is not None and maker.signs is None:
            maker.signs = operation.target
        else:
            fused.append(operation)
    return fused


def _compare_sums(producer: Operation, target: Buffer) -> None:
    """Make the operation that ends in floats of sums end in their signs."""
    channels, relu = producer.target.channels, Flag.RELU in producer.flags
    producer.factor, producer.offset = thresholds(producer.factor, producer.offset, relu, channels)
    producer.target, producer.flags = target, Flag.NONE
    if producer.kind is Kind.AFFINE:
        producer.kind = Kind.THRESHOLD


def _maker(fused: Sequence[Operation], buffer: Buffer) -> Operation | None:
    return next((o for o in fused if o.target is buffer), None)


def _readers(operations: Sequence[Operation], buffer: Buffer) -> int:
    return sum((o.source is buffer) + (o.other is buffer) for o in operations)


def _takes_affine(producer: Operation, affine: Operation) -> bool:
    if producer.signs is not None or producer.other is not None or Flag.RELU in producer.flags:
        return False
    if producer.kind not in (Kind.CONV, Kind.BINARY_CONV, Kind.AFFINE, Kind.LAYER_NORM):
        return False
    # values * factor + offset: a factor must not come after an offset.
    return (affine.factor is None or (producer.factor is None and producer.offset is None)) and (
        affine.offset is None or producer.offset is None
    )


def _adder(operations: Sequence[Operation], fused: Sequence[Operation], add: Operation) -> Operation | None:
    """Return the operation that can add in its own last step: the later of the two that it adds."""
    for operation in reversed(fused):
        if operation.target is add.source or operation.target is add.other:
            can = operation.kind in (Kind.CONV, Kind.BINARY_CONV, Kind.AFFINE) and operation.other is None
            can = can and operation.signs is None
            if can and Flag.RELU not in operation.flags and _readers(operations, operation.target) == 1:
                return operation
            if operation.kind not in (Kind.CONV, Kind.BINARY_CONV, Kind.AFFINE):
                continue
    return None


def _is_affine_of_sums(operation: Operation) -> bool:
    if operation.other is not None:
        return False
    return operation.kind is Kind.BINARY_CONV or (operation.kind is Kind.AFFINE and operation.source.type is Type.SUMS)


def thresholds(factor: Array | None, offset: Array | None, relu: bool, num_channels: int) -> tuple[Array, Array]:
    """Return thresholds t and directions d, int32: the sign of sum * factor + offset is +1 exactly
    where sum * d >= t.

    Rounding is monotonic, so bisection over the integers finds t as float32 arithmetic has it.
    """
    size = len(factor) if factor is not None else len(offset) if offset is not None else num_channels
    a = np.ones(size, np.float32) if factor is None else factor.astype(np.float32)
    b = np.zeros(size, np.float32) if offset is None else offset.astype(np.float32)
    direction = np.where(a < 0, -1, 1).astype(np.int32)

    def is_positive(product: Array) -> Array:
        values = (product * direction).astype(np.float32) * a + b
        return np.asarray(~(np.maximum(values, np.float32(0)) < 0) if relu else ~(values < 0))

    low, high = np.full(size, -(1 << 24), np.int64), np.full(size, 1 << 24, np.int64)  # sums of products are in between
    always, never = is_positive(low), ~is_positive(high)
    while (high - low > 1).any():
        middle = (low + high) // 2
        positive = is_positive(middle)
        high, low = np.where(positive, middle, high), np.where(positive, low, middle)
    result = np.where(always, -ALWAYS, np.where(never, ALWAYS, high))
    return result.astype(np.int32), direction
