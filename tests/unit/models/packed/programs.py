"""Small programs for tests: networks of models/, and random operations of every kind."""

import numpy as np
import torch
from torch import nn

from bitfleet.models import ModelConfig, create_model
from bitfleet.models.layers.real_layers import ChannelBias
from bitfleet.packed.lowering import lower
from bitfleet.packed.program import Array, Buffer, Flag, Kind, Operation, Program, Type

CLASSES = ["ankle boot", 'a "bag"', "caf\u00e9", "\U0001f9e6", "\\"]
CHANNELS = (1, 2, 3, 5, 31, 32, 37, 63, 64, 65, 96, 100, 128, 130)
MOST_PRODUCTS = 3_000_000
"""Multiply-adds of a random convolution."""
NETWORKS = {
    "birealnet18": (ModelConfig(name="birealnet18", width=5, depths=(2, 2, 2), num_classes=5), 32),
    "layer": (ModelConfig(name="birealnet18", width=6, depths=(2, 2), norm="layer", num_classes=5), 17),
    "none": (ModelConfig(name="birealnet_small", width=7, norm="none", num_classes=5), 16),
    "binarynet": (ModelConfig(name="binarynet", width=20, num_classes=5), 32),
    "reactnet_a": (ModelConfig(name="reactnet_a", width=6, num_classes=5), 40),
    "quicknet": (ModelConfig(name="quicknet", width=64, depths=(1, 1), num_classes=5), 40),
    "real_to_binary": (ModelConfig(name="real_to_binary", width=16, depths=(1, 1), num_classes=5), 40),
}
SMALLEST = ("birealnet18", "layer", "none")


def network(name: str) -> Program:
    """Return a network of NETWORKS with random weights and statistics."""
    config, size = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(config)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 3)
                if module.affine:
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)
            elif isinstance(module, nn.PReLU):
                nn.init.normal_(module.weight)
            elif isinstance(module, ChannelBias):
                nn.init.normal_(module.bias)
    return lower(model, size, (120, 115, 110), (60, 59, 58), {"classes": CLASSES})


def random_image(program: Program, seed: int) -> Array:
    """Return uint8 [height, width, channels]."""
    source = program.operations[0].source
    return np.random.default_rng(seed).integers(0, 256, (source.height, source.width, source.channels), np.uint8)


def random_program(seed: int) -> Program:
    """Return a few random operations of every kind on images of any shape, and a head."""
    return Program(_Random(np.random.default_rng(seed)).operations(), {"classes": CLASSES})


class _Random:
    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self.made: list[Operation] = []
        self.readable: list[Buffer] = []

    def integer(self, least: int, most: int) -> int:
        return int(self.generator.integers(least, most + 1))

    def channels(self) -> int:
        return int(self.generator.choice(CHANNELS))

    def chance(self, probability: float = 0.5) -> bool:
        return bool(self.generator.random() < probability)

    def floats(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape).astype(np.float32)

    def maybe(self, channels: int) -> Array | None:
        return self.floats(channels) if self.chance() else None

    def operations(self) -> list[Operation]:
        height, width, channels = self.integer(1, 14), self.integer(1, 14), self.integer(1, 5)
        image, normalized = Buffer(height, width, channels), Buffer(height, width, channels)
        deviation = self.generator.uniform(20, 80, channels).astype(np.float32)
        self.add(
            Operation(Kind.NORMALIZE, image, normalized, factor=deviation, offset=self.floats(channels) * 30 + 120)
        )
        for _ in range(self.integer(2, 8)):
            self.add_any(self.readable[-1])
        while self.readable[-1].type is not Type.FLOATS:
            self.add_any(self.readable[-1])
        last = self.readable[-1]
        mean = Buffer(1, 1, last.channels)
        self.add(Operation(Kind.MEAN, last, mean))
        weight = self.floats(1, last.channels, self.channels())
        self.add(
            Operation(
                Kind.CONV, mean, Buffer(1, 1, weight.shape[2]), weight=weight, offset=self.floats(weight.shape[2])
            )
        )
        return self.made

    def add(self, operation: Operation) -> None:
        if operation.target.type is Type.FLOATS and self.chance(0.3):
            target = operation.target
            operation.signs = Buffer(target.height, target.width, target.channels, Type.SIGNS)
            operation.sign_shift = self.maybe(target.channels)
        self.made.append(operation)
        self.readable.append(operation.target)
        if operation.signs is not None and self.chance():
            self.readable.append(operation.signs)

    def add_any(self, source: Buffer) -> None:
        if source.type is Type.SIGNS:
            self.add_binary(source, Type(self.integer(0, 2)))
        elif source.type is Type.SUMS:
            ways = [self.add_affine, self.add_pool, self.add_threshold, self.add_layer_norm, self.add_scale]
            ways[self.integer(0, len(ways) - 1)](source)
        else:
            ways = [self.add_affine, self.add_pool, self.add_sign, self.add_sign, self.add_sign, self.add_layer_norm]
            ways += [self.add_floats, self.add_depthwise, self.add_scale, self.add_concatenation, self.add_sigmoid]
            ways[self.integer(0, len(ways) - 1)](source)

    def other(self, target: Buffer) -> Buffer | None:
        fitting = [
            buffer
            for buffer in self.readable
            if (buffer.height, buffer.width, buffer.channels, buffer.type)
            == (target.height, target.width, target.channels, Type.FLOATS)
        ]
        return fitting[self.integer(0, len(fitting) - 1)] if fitting and self.chance() else None

    def window(self, source: Buffer, outputs: int, type_: Type) -> Operation:
        """Return an operation whose every window has a pixel of the image."""
        kernel = (self.integer(1, 5), self.integer(1, 5))
        stride, top, left = self.integer(1, 3), self.integer(0, kernel[0] - 1), self.integer(0, kernel[1] - 1)
        height = self.integer(1, (source.height + top - 1) // stride + 1)
        width = self.integer(1, (source.width + left - 1) // stride + 1)
        target = Buffer(height, width, outputs, type_)
        return Operation(Kind.CONV, source, target, kernel=kernel, stride=stride, top=top, left=left)

    def convolution(self, source: Buffer, type_: Type) -> Operation:
        while True:
            operation = self.window(source, self.channels(), type_)
            target, taps = operation.target, operation.kernel[0] * operation.kernel[1]
            if target.height * target.width * target.channels * taps * source.channels <= MOST_PRODUCTS:
                return operation

    def finish(self, operation: Operation) -> None:
        """Give it steps: factors, offsets, what is added, ReLUs, slopes, or none of them."""
        channels = operation.target.channels
        operation.factor, operation.offset = self.maybe(channels), self.maybe(channels)
        if operation.kind not in (Kind.LAYER_NORM, Kind.SCALE):
            operation.other = self.other(operation.target)
        if self.chance():
            operation.shift, operation.slope, operation.after = (self.maybe(channels) for _ in range(3))
        operation.flags |= Flag.RELU if self.chance(0.3) else Flag.NONE
        operation.flags |= Flag.RELU_FIRST if self.chance(0.3) else Flag.NONE

    def add_floats(self, source: Buffer) -> None:
        operation = self.convolution(source, Type.FLOATS)
        operation.weight = self.floats(
            operation.kernel[0] * operation.kernel[1], source.channels, operation.target.channels
        )
        if self.chance(0.3):
            operation.weight, operation.flags = operation.weight > 0, Flag.BINARY_WEIGHT
        self.finish(operation)
        self.add(operation)

    def add_depthwise(self, source: Buffer) -> None:
        operation = self.window(source, source.channels, Type.FLOATS)
        operation.kind = Kind.DEPTHWISE
        operation.weight = self.floats(operation.kernel[0] * operation.kernel[1], source.channels)
        self.finish(operation)
        self.add(operation)

    def add_scale(self, source: Buffer) -> None:
        """Multiply by what one pixel of floats becomes."""
        floats = source
        if source.type is Type.SUMS:
            floats = Buffer(source.height, source.width, source.channels)
            self.add(Operation(Kind.AFFINE, source, floats))
        mean, factors = (Buffer(1, 1, source.channels) for _ in range(2))
        self.add(Operation(Kind.MEAN, floats, mean))
        self.add(Operation(Kind.SIGMOID, mean, factors))
        operation = Operation(Kind.SCALE, source, Buffer(source.height, source.width, source.channels), other=factors)
        self.finish(operation)
        self.add(operation)

    def add_concatenation(self, source: Buffer) -> None:
        size = (source.height, source.width, Type.FLOATS)
        fitting = [buffer for buffer in self.readable if (buffer.height, buffer.width, buffer.type) == size]
        other = fitting[self.integer(0, len(fitting) - 1)]
        target = Buffer(source.height, source.width, source.channels + other.channels)
        self.add(Operation(Kind.CONCAT, source, target, other=other))

    def add_sigmoid(self, source: Buffer) -> None:
        self.add(Operation(Kind.SIGMOID, source, Buffer(source.height, source.width, source.channels)))

    def add_binary(self, source: Buffer, type_: Type) -> None:
        operation = self.convolution(source, type_)
        taps = operation.kernel[0] * operation.kernel[1]
        operation.kind = Kind.BINARY_CONV
        operation.weight = self.floats(operation.target.channels, taps, source.channels) > 0
        operation.flags = Flag.PAD_ONES if self.chance() else Flag.NONE
        if type_ is Type.FLOATS:
            self.finish(operation)
        elif type_ is Type.SIGNS:
            self.set_thresholds(operation)
        self.add(operation)

    def set_thresholds(self, operation: Operation) -> None:
        channels = operation.target.channels
        operation.factor = self.generator.integers(-9, 10, channels, np.int32)
        operation.factor[self.floats(channels) > 2] = 1 << 30
        operation.offset = np.where(self.floats(channels) > 0, 1, -1).astype(np.int32)

    def add_threshold(self, source: Buffer) -> None:
        target = Buffer(source.height, source.width, source.channels, Type.SIGNS)
        operation = Operation(Kind.THRESHOLD, source, target)
        self.set_thresholds(operation)
        self.add(operation)

    def add_sign(self, source: Buffer) -> None:
        target = Buffer(source.height, source.width, source.channels, Type.SIGNS)
        self.add(Operation(Kind.SIGN, source, target, offset=self.maybe(source.channels)))

    def add_affine(self, source: Buffer) -> None:
        operation = Operation(Kind.AFFINE, source, Buffer(source.height, source.width, source.channels))
        self.finish(operation)
        if operation.other is not None and source.type is Type.FLOATS and self.chance():
            operation.kind = Kind.ADD
        self.add(operation)

    def add_layer_norm(self, source: Buffer) -> None:
        target = Buffer(source.height, source.width, source.channels)
        operation = Operation(Kind.LAYER_NORM, source, target, real=1e-3)
        self.finish(operation)
        self.add(operation)

    def add_pool(self, source: Buffer) -> None:
        operation = self.window(source, source.channels, source.type)
        is_mean = source.type is Type.FLOATS and self.chance()
        operation.kind = Kind.AVG_POOL if is_mean else Kind.MAX_POOL
        operation.flags = Flag.COUNT_PADDING if is_mean and self.chance() else Flag.NONE
        self.add(operation)
