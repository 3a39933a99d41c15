"""Lower a trained network to a packed program.

`torch.export` gives the operators of a forward pass; each becomes an operation, and fusion.py
merges them. What depends on no image is computed here. An operator is lowered only where a program
does just that; otherwise one sentence says what programs cannot do.
"""

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from bitfleet.packed.fusion import fuse
from bitfleet.packed.program import Array, Buffer, Flag, Kind, Operation, Program, Type


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
            raise _refusal(f"values of {name} are not finite")
        if getattr(tensor, "binary", False) and not (tensor.abs() == 1).all():
            raise _refusal(f"weights of {name} are not +-1: train at least one step, or bnew to its end")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            exported = torch.export.export(model, (torch.zeros(1, 3, image_size, image_size),))
        operations = _Lowering(model, exported, image_size, mean, std).run()
    finally:
        model.train(was_training)
    return Program(fuse(operations), dict(description or {}))


def _refusal(reason: str) -> ValueError:
    return ValueError(f"the network cannot be exported: {reason}")


class _Value:
    """Result of a node: a buffer, with what has been done to it that needs no operation."""

    def __init__(
        self, buffer: Buffer, *, padding: Sequence[int] = (0, 0, 0, 0), pad_value: float = 0, steps: int = 0
    ) -> None:
        self.buffer, self.padding, self.pad_value, self.steps = buffer, tuple(padding), pad_value, steps
        """Padding: left, right, top, bottom. Steps: of the three of a sign, see `_Lowering.sgn`."""

    def is_same(self, other: Any) -> bool:
        """Return True if both hold the same numbers, in the same memory."""
        return isinstance(other, _Value) and vars(self) == vars(other)


class _Lowering:
    def __init__(
        self, model: nn.Module, exported: Any, image_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.graph = exported.graph
        self.operations: list[Operation] = []
        self.values: dict[Node, _Value | Tensor] = {}
        self.binary = {
            name for name, param in model.named_parameters(remove_duplicate=False) if getattr(param, "binary", False)
        }
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
            "prelu": self.prelu,
            "sigmoid": self.sigmoid,
            "cat": self.concatenation,
            "flatten": self.flatten,
        }
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            arguments = [self.argument(arg) for arg in node.args]
            if node.op == "output":
                return self.end(arguments[0])
            if node.target is operator.getitem:  # of binary_conv2d: the result, and what backward needs
                if node.args[1] == 0:
                    self.values[node] = arguments[0]
                continue
            in_place = node.target._schema.name.endswith("_")
            name = node.target._schema.name.partition("::")[2].removesuffix("_")
            self.node = node
            self.check_arguments(name, arguments)
            if not any(isinstance(value, _Value) for value in _flat(arguments)):
                self.values[node] = self.weight(name, node, arguments)
            elif name in handlers:
                self.check_signature(name, handlers[name], arguments, node.kwargs)
                self.values[node] = handlers[name](*arguments, **node.kwargs)
            else:
                self.values[node] = self.view(name, node, arguments)
            if in_place:  # what reads the changed tensor later
                self.check_other_names(node)
                self.values[node.args[0]] = self.values[node]
        raise AssertionError("a graph without output")

    def argument(self, given: Any) -> Any:
        """Return the value of an argument of a node, or values of a list of them."""
        if isinstance(given, list | tuple):
            return [self.argument(one) for one in given]
        return self.values.get(given, given) if isinstance(given, Node) else given

    def weight(self, name: str, node: Node, arguments: list[Any]) -> Tensor:
        """Compute what depends on no image."""
        assert callable(node.target)
        if not any(isinstance(value, Tensor) for value in _flat(arguments)):
            raise _refusal(f"it uses {name}, which programs do not have")
        if name in ("view", "reshape", "flatten", "unsqueeze") and node.args[0] in self.binary_nodes:
            self.binary_nodes.add(node)
        with torch.no_grad():
            copies = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
            result: Tensor = node.target(*copies, **node.kwargs)
        return result

    def check_arguments(self, name: str, arguments: list[Any]) -> None:
        """Refuse operators that cannot read signs, padding or a half-made sign."""
        for value in _flat(arguments):
            if not isinstance(value, _Value):
                continue
            if value.steps and name not in ("sgn", "add"):
                raise _refusal("it has a sign whose value at 0 is 0")
            if any(value.padding) and name not in ("conv2d", "avg_pool2d"):
                raise _refusal(f"it pads before {name}, not before a convolution or a mean of pixels")
            signs_to = ("conv2d", "linear", "pad", "flatten", "view", "reshape", "dropout", "contiguous")
            if value.buffer.type is Type.SIGNS and name not in signs_to:
                raise _refusal(f"it uses signs for something else than a convolution: {name}")

    def check_other_names(self, node: Node) -> None:
        """Refuse to change in place what is read later as the result of another node."""
        nodes = list(self.graph.nodes)
        read_later = {source for later in nodes[nodes.index(node) + 1 :] for source in later.all_input_nodes}
        target = node.args[0]
        assert isinstance(target, Node)
        changed = self.values[target]
        for other in read_later - {node, target}:
            if isinstance(changed, _Value) and changed.is_same(self.values.get(other)):
                raise _refusal(f"it changes a tensor in place that it reads under another name: {node.target}")

    def check_signature(self, name: str, handler: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        """Refuse options that are unknown here, and images where weights are expected."""
        try:
            inspect.signature(handler).bind(*arguments, **options)
        except TypeError:
            raise _refusal(f"it uses {name} in a way that programs do not have") from None
        images = [isinstance(value, _Value) for value in arguments]
        if name not in ("add", "mul", "cat") and images != [True] + [False] * (len(images) - 1):
            raise _refusal(f"it uses {name} in a way that programs do not have")

    def end(self, results: list[Any]) -> list[Operation]:
        """Return the operations that compute the logits, of which the last one gives them."""
        if len(results) != 1 or not isinstance(results[0], _Value):
            raise _refusal("its result is not one tensor of logits")
        self.check_arguments("its result", results)
        logits = self.as_floats(results[0].buffer)
        if (logits.height, logits.width) != (1, 1):
            raise _refusal("its result is not a row of logits")
        needed, result = {id(logits)}, []
        for operation in reversed(self.operations):
            if id(operation.target) in needed:
                needed |= {id(buffer) for buffer in operation.buffers}
                result.append(operation)
        return result[::-1]

    def view(self, name: str, node: Node, arguments: list[Any]) -> _Value:
        source = arguments[0]
        shape = tuple(node.meta["val"].shape)
        if name == "movedim" and tuple(node.args[1:]) not in ((1, -1), (-1, 1)):
            raise _refusal("it moves dimensions of images")
        if name in ("movedim", "dropout", "contiguous") or (name in ("unsqueeze", "view", "reshape") and shape[0] == 1):
            before = source.buffer.height * source.buffer.width
            if name in ("view", "reshape") and before > 1 and len(shape) == 2:
                return self.flatten(source)
            keeps = before == 1 and shape[1:2] == (source.buffer.channels,)
            if keeps or name in ("movedim", "dropout", "contiguous"):
                return _Value(source.buffer)
        raise _refusal(f"it uses {name}, which programs do not have")

    def per_channel(self, values: Tensor, channels: int) -> Array:
        """Return values per channel of a tensor that a node broadcasts to its result."""
        shape, result = tuple(values.shape), self.node.meta["val"].shape
        wanted = (channels,) + (1,) * (len(result) - 2)
        fits = (1,) * (len(result) - len(shape)) + shape == (1, *wanted)
        if values.numel() != 1 and not fits:
            raise _refusal(f"it has an operator whose weight of shape {shape} is not one value per channel")
        return np.array(np.broadcast_to(values.reshape(-1).float().numpy(), channels))

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
        channels = source.buffer.channels
        is_depthwise = groups == channels == weight.shape[0] and source.buffer.type is not Type.SIGNS and groups > 1
        if not (groups == 1 or is_depthwise) or set(dilation) != {1} or len(set(stride)) != 1:
            raise _refusal("it has a grouped, dilated or unevenly strided convolution")
        if isinstance(padding, str):
            raise _refusal(f"it has a convolution with the padding {padding!r}")
        left, right, top, bottom = source.padding
        vertical, horizontal = padding[0], padding[-1]
        if source.pad_value and any(padding):
            raise _refusal("it has a convolution that pads with ones and with zeros")
        pads = (left + horizontal, right + horizontal, top + vertical, bottom + vertical)
        if is_depthwise:
            return self.depthwise(source, weight, bias, stride[0], pads)
        has_ones = source.pad_value != 0 and any(pads)
        return self.convolution(source.buffer, weight, bias, stride[0], pads, self.is_binary(1), has_ones)

    def is_binary(self, argument: int) -> bool:
        return self.node.args[argument] in self.binary_nodes

    def depthwise(
        self, source: _Value, weight: Tensor, bias: Tensor | None, stride: int, pads: Sequence[int]
    ) -> _Value:
        if source.pad_value:
            raise _refusal("it pads something else than signs with ones")
        channels, _, *kernel = weight.shape
        buffer = self.as_floats(source.buffer)
        common, height, width = self.window(buffer, kernel, stride, pads)
        values = weight.reshape(channels, -1).T.numpy().astype(np.float32)
        offset = None if bias is None else bias.numpy().astype(np.float32)
        target = Buffer(height, width, channels)
        return _Value(self.add(Operation(Kind.DEPTHWISE, buffer, target, weight=values, offset=offset, **common)))

    def window(
        self, source: Buffer, kernel: Sequence[int], stride: int, pads: Sequence[int]
    ) -> tuple[dict[str, Any], int, int]:
        """Return fields of an operation, height and width of its result.

        Args:
            source: the image.
            kernel: height and width.
            stride: in both directions.
            pads: left, right, top, bottom.
        """
        left, right, top, bottom = pads
        if max(top, bottom) >= kernel[0] or max(left, right) >= kernel[1]:
            raise _refusal(f"a window of {kernel[0]}x{kernel[1]} pixels may lie in its padding {tuple(pads)}")
        height = (source.height + top + bottom - kernel[0]) // stride + 1
        width = (source.width + left + right - kernel[1]) // stride + 1
        return {"kernel": tuple(kernel), "stride": stride, "top": top, "left": left}, height, width

    def convolution(
        self,
        source: Buffer,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: Sequence[int],
        is_binary: bool,
        has_ones: bool = False,
    ) -> _Value:
        outputs, channels, *kernel = weight.shape
        common, height, width = self.window(source, kernel, stride, padding)
        offset = None if bias is None else bias.numpy().astype(np.float32)
        if source.type is Type.SIGNS:
            if not is_binary:
                raise _refusal("it multiplies signs by weights that are not binary")
            signs = (weight > 0).permute(0, 2, 3, 1).reshape(outputs, -1, channels).numpy()
            target, flags = Buffer(height, width, outputs, Type.SUMS), Flag.PAD_ONES if has_ones else Flag.NONE
            self.add(Operation(Kind.BINARY_CONV, source, target, weight=signs, flags=flags, **common))
            if offset is not None:
                sums, target = target, Buffer(height, width, outputs)
                self.add(Operation(Kind.AFFINE, sums, target, offset=offset))
            return _Value(target)
        if has_ones:
            raise _refusal("it pads something else than signs with ones")
        source = self.as_floats(source)
        values = weight.permute(2, 3, 1, 0).reshape(-1, channels, outputs).numpy()
        flags = Flag.BINARY_WEIGHT if is_binary else Flag.NONE
        stored = values > 0 if is_binary else values.astype(np.float32)
        target = Buffer(height, width, outputs)
        self.add(Operation(Kind.CONV, source, target, weight=stored, offset=offset, flags=flags, **common))
        return _Value(target)

    def binary_conv2d(self, source: _Value, weight: Tensor, layer: Sequence[int], dtype: Any) -> _Value:
        stride, left, right, top, bottom, has_ones = layer[8:14]
        pads = (left, right, top, bottom)
        signs = self.sign(source.buffer)
        return self.convolution(signs, weight, None, stride, pads, self.is_binary(1), bool(has_ones and any(pads)))

    def linear(self, source: _Value, weight: Tensor, bias: Tensor | None = None) -> _Value:
        buffer = source.buffer
        if len(self.node.meta["val"].shape) != 2:
            raise _refusal("it has a linear layer of columns of an image")
        shaped = weight.reshape(weight.shape[0], buffer.channels, buffer.height, buffer.width)
        return self.convolution(buffer, shaped, bias, 1, (0, 0, 0, 0), self.is_binary(1))

    def affine(self, source: Buffer, factor: Array | None, offset: Array | None) -> _Value:
        target = Buffer(*_size(source))
        if any(values is not None and len(values) != source.channels for values in (factor, offset)):
            raise _refusal("it normalizes something else than channels of images")
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
        if training:
            raise _refusal("a batch normalization has no running statistics")
        factor = 1 / torch.sqrt(variance + eps)
        if weight is not None:
            factor = factor * weight
        offset = (torch.zeros_like(mean) if bias is None else bias) - mean * factor
        return self.affine(source.buffer, factor.numpy(), offset.numpy())

    def layer_norm(
        self, source: _Value, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, _: bool
    ) -> _Value:
        buffer = source.buffer
        if list(shape) != [buffer.channels]:
            raise _refusal("a LayerNorm is not over channels")
        target = Buffer(buffer.height, buffer.width, buffer.channels)
        factor, offset = (None if value is None else value.numpy() for value in (weight, bias))
        return _Value(self.add(Operation(Kind.LAYER_NORM, buffer, target, factor=factor, offset=offset, real=eps)))

    def pool(
        self, kind: Kind, buffer: Buffer, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int], flags: Flag
    ) -> _Value:
        shape = self.node.meta["val"].shape
        if len(set(stride)) != 1:
            raise _refusal("it has an unevenly strided pool")
        target = Buffer(shape[2], shape[3], buffer.channels, buffer.type)
        common, _, _ = self.window(buffer, (kernel[0], kernel[-1]), stride[0], pads)  # without ceil_mode
        return _Value(self.add(Operation(kind, buffer, target, flags=flags, **common)))

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
            raise _refusal("it has a dilated pool")
        pads = (padding[-1], padding[-1], padding[0], padding[0])
        return self.pool(Kind.MAX_POOL, source.buffer, kernel, stride or kernel, pads, Flag.NONE)

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
        counts = any(source.padding) or (count_include_pad and any(padding))
        if divisor is not None or source.pad_value or (count_include_pad and ceil_mode):
            raise _refusal("a mean of pixels has another divisor, or counts some pixels outside of the image")
        if counts and (ceil_mode or (any(padding) and not count_include_pad)):
            raise _refusal("a mean counts some pixels outside of the image and not others")
        left, right, top, bottom = source.padding
        pads = (left + padding[-1], right + padding[-1], top + padding[0], bottom + padding[0])
        flags = Flag.COUNT_PADDING if counts else Flag.NONE
        return self.pool(Kind.AVG_POOL, self.as_floats(source.buffer), kernel, stride or kernel, pads, flags)

    def sgn(self, source: _Value) -> _Value:
        """sgn(sgn(x) + 0.1): the first is a step on the way, the second the sign."""
        if source.steps == 1:
            raise _refusal("it has a sign whose value at 0 is 0")
        if source.steps == 2:
            return _Value(self.sign(source.buffer))
        return _Value(source.buffer, steps=1)

    def sign(self, source: Buffer) -> Buffer:
        target = Buffer(source.height, source.width, source.channels, Type.SIGNS)
        return self.add(Operation(Kind.SIGN, self.as_floats(source), target))

    def sum_of(self, first: Any, second: Any) -> _Value:
        if not isinstance(first, _Value):
            first, second = second, first
        if isinstance(second, float) and first.steps == 1 and second == 0.1:
            return _Value(first.buffer, steps=2)
        if first.steps or (isinstance(second, _Value) and second.steps):
            raise _refusal("it has a sign whose value at 0 is 0")
        if isinstance(second, Tensor):
            return self.affine(first.buffer, None, self.per_channel(second, first.buffer.channels))
        if not isinstance(second, _Value):
            raise _refusal(f"it adds {second}")
        one, other = (self.as_floats(value.buffer) for value in (first, second))
        if _size(one) != _size(other):
            raise _refusal("it adds images of different sizes")
        return _Value(self.add(Operation(Kind.ADD, one, Buffer(*_size(one)), other=other)))

    def as_floats(self, buffer: Buffer) -> Buffer:
        return self.affine(buffer, None, None).buffer if buffer.type is Type.SUMS else buffer

    def product_of(self, first: Any, second: Any) -> _Value:
        if not isinstance(first, _Value):
            first, second = second, first
        if isinstance(second, Tensor):
            return self.affine(first.buffer, self.per_channel(second, first.buffer.channels), None)
        if not isinstance(second, _Value):
            raise _refusal(f"it multiplies by {second}")
        image, factors = first.buffer, second.buffer
        if (factors.height, factors.width) != (1, 1):
            image, factors = factors, image
        factors = self.as_floats(factors)
        if _size(factors) != (1, 1, image.channels) or image is factors:
            raise _refusal("it multiplies images by something else than one value per channel")
        return _Value(self.add(Operation(Kind.SCALE, image, Buffer(*_size(image)), other=factors)))

    def pad(self, source: _Value, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> _Value:
        if mode != "constant" or value not in (None, 0, 1) or len(padding) != 4 or min(padding) < 0:
            raise _refusal("it pads with something else than zeros or ones, or cuts")
        return _Value(source.buffer, padding=padding, pad_value=value or 0)

    def mean(self, source: _Value, dimensions: Sequence[int], keepdim: bool = False) -> _Value:
        if sorted(d % 4 for d in dimensions) != [2, 3]:
            raise _refusal("a mean is not over all pixels")
        buffer = self.as_floats(source.buffer)
        if self.node.meta["val"].shape[:2] != (1, buffer.channels):
            raise _refusal("a mean is not over all pixels")
        return _Value(self.add(Operation(Kind.MEAN, buffer, Buffer(1, 1, buffer.channels))))

    def adaptive_avg_pool2d(self, source: _Value, size: int | Sequence[int]) -> _Value:
        if any(side != 1 for side in ([size] if isinstance(size, int) else size)):
            raise _refusal("it has an adaptive pool to more than one pixel")
        return self.mean(source, (2, 3))

    def relu(self, source: _Value) -> _Value:
        operation = Operation(Kind.AFFINE, source.buffer, Buffer(*_size(source.buffer)), flags=Flag.RELU_FIRST)
        return _Value(self.add(operation))

    def prelu(self, source: _Value, weight: Tensor) -> _Value:
        buffer = source.buffer
        if weight.numel() not in (1, buffer.channels):
            raise _refusal("it has a PReLU of something else than channels of images")
        slope = np.array(np.broadcast_to(weight.reshape(-1).float().numpy(), buffer.channels))
        return _Value(self.add(Operation(Kind.AFFINE, buffer, Buffer(*_size(buffer)), slope=slope)))

    def sigmoid(self, source: _Value) -> _Value:
        buffer = self.as_floats(source.buffer)
        return _Value(self.add(Operation(Kind.SIGMOID, buffer, Buffer(*_size(buffer)))))

    def concatenation(self, values: list[Any], dimension: int = 0) -> _Value:
        """Join images along their channels, two at a time."""
        shape = self.node.meta["val"].shape
        if dimension % len(shape) != 1 or not all(isinstance(value, _Value) for value in values):
            raise _refusal("it concatenates something else than channels of images")
        first, *others = [self.as_floats(value.buffer) for value in values]
        for other in others:
            target = Buffer(first.height, first.width, first.channels + other.channels)
            if _size(other)[:2] != _size(first)[:2]:
                raise _refusal("it concatenates something else than channels of images")
            first = self.add(Operation(Kind.CONCAT, first, target, other=other))
        is_row = len(shape) == 2 and _size(first)[:2] == (1, 1)
        if tuple(shape[1:]) != ((first.channels,) if is_row else _shape(first)):
            raise _refusal("it concatenates something else than channels of images")
        return _Value(first)

    def flatten(self, source: _Value, start: int = 1, end: int = -1) -> _Value:
        if start != 1 or len(self.node.meta["val"].shape) != 2:
            raise _refusal("it flattens some of an image's dimensions")
        return _Value(source.buffer)


def _size(buffer: Buffer) -> tuple[int, int, int]:
    return buffer.height, buffer.width, buffer.channels


def _shape(buffer: Buffer) -> tuple[int, int, int]:
    return buffer.channels, buffer.height, buffer.width


def _flat(arguments: Sequence[Any]) -> list[Any]:
    return [one for each in arguments for one in (each if isinstance(each, list) else [each])]


def _row(values: Sequence[float]) -> Array:
    return np.asarray(values, np.float32)
