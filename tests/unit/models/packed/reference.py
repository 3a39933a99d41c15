"""Run a packed program with numpy, as its definition reads."""

import dataclasses

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from bitfleet.packed.program import Array, Buffer, Flag, Kind, Operation, Type

TIE = 1e-5
"""Values nearer to 0, relative to the largest, have a sign that depends on the order of sums."""


@dataclasses.dataclass
class Results:
    """Results of a program for an image."""

    sums: list[Array]
    """Sums of products of each binary convolution, int32 [height, width, channels]."""
    logits: Array
    has_ties: bool
    """A sign depends on rounding."""


def run(operations: list[Operation], image: Array) -> Results:
    """Compute the logits of `image`, uint8 [height, width, channels], and the sums on the way."""
    values: dict[int, Array] = {id(operations[0].source): image.astype(np.float32)}
    sums, has_ties = [], False
    for o in operations:
        other = None if o.other is None else values[id(o.other)]
        result = _result(o, values[id(o.source)], other)
        if o.kind is Kind.BINARY_CONV:
            sums.append(result)
        if o.target.type is Type.FLOATS:
            result = _finished(o, result.astype(np.float32), other)
        elif o.target.type is Type.SIGNS and o.kind is not Kind.SIGN:
            assert o.factor is not None
            assert o.offset is not None
            result = result * o.offset >= o.factor
        if o.kind in (Kind.CONV, Kind.DEPTHWISE):
            has_ties |= _has_ties(o, result)
        for buffer in (o.signs, o.target if o.kind is Kind.SIGN else None):
            if buffer is not None:
                shift = o.offset if o.kind is Kind.SIGN else o.sign_shift
                shifted = result if shift is None else result + shift
                has_ties |= _has_ties(o, shifted)
                values[id(buffer)] = shifted >= 0
        if o.kind is not Kind.SIGN:
            values[id(o.target)] = result
        assert values[id(o.target)].shape == _shape(o.target)
    return Results(sums, values[id(operations[-1].target)].reshape(-1), has_ties)


def _has_ties(o: Operation, result: Array) -> bool:
    near = np.abs(result) <= TIE * np.abs(result).max()
    if o.kind not in (Kind.CONV, Kind.DEPTHWISE) or o.flags & (Flag.RELU | Flag.RELU_FIRST):
        near &= result != 0  # a 0 of other operations is no accident
    return bool(near.any())


def _shape(buffer: Buffer) -> tuple[int, int, int]:
    return buffer.height, buffer.width, buffer.channels


def _result(o: Operation, x: Array, other: Array | None) -> Array:
    if o.kind is Kind.NORMALIZE:
        return np.asarray((x - o.offset) / o.factor)
    if o.kind is Kind.BINARY_CONV:
        assert o.weight is not None
        weight = np.where(o.weight, 1, -1).transpose(1, 2, 0)
        return _convolved(o, np.where(x, 1, -1), weight, int(Flag.PAD_ONES in o.flags)).astype(np.int32)
    if o.kind is Kind.DEPTHWISE:
        assert o.weight is not None
        windows = _windows(o, x.astype(np.float64), 0)
        return np.asarray((windows * o.weight.T.reshape(-1, *o.kernel)).sum((3, 4)))
    if o.kind is Kind.CONCAT:
        return np.concatenate([x, np.asarray(other)], 2)
    if o.kind is Kind.SIGMOID:
        return np.asarray(1 / (1 + np.exp(-x.astype(np.float64))))
    if o.kind is Kind.SCALE:
        assert other is not None
        return np.asarray(x.astype(np.float32) * other)
    if o.kind is Kind.CONV:
        assert o.weight is not None
        weight = np.where(o.weight, 1.0, -1.0) if o.weight.dtype == bool else o.weight.astype(np.float64)
        return _convolved(o, x.astype(np.float64), weight).astype(np.float32)
    if o.kind is Kind.MAX_POOL:
        least = np.iinfo(np.int32).min if x.dtype == np.int32 else -np.inf
        return np.asarray(_windows(o, x, least).max((3, 4)))
    if o.kind is Kind.AVG_POOL:
        total, count = (_windows(o, values, 0).sum((3, 4)) for values in (x.astype(np.float64), np.ones_like(x)))
        return np.asarray(total / (o.kernel[0] * o.kernel[1] if Flag.COUNT_PADDING in o.flags else count))
    if o.kind is Kind.MEAN:
        return np.asarray(x.astype(np.float64).mean((0, 1), keepdims=True))
    if o.kind is Kind.LAYER_NORM:
        centered = x.astype(np.float64) - x.mean(2, keepdims=True, dtype=np.float64)
        return np.asarray(centered / np.sqrt((centered**2).mean(2, keepdims=True) + o.real))
    return x  # AFFINE, SIGN, THRESHOLD, ADD


def _finished(o: Operation, x: Array, added: Array | None) -> Array:
    x = np.maximum(x, 0) if Flag.RELU_FIRST in o.flags else x
    if o.kind is not Kind.NORMALIZE:
        x = x if o.factor is None else x * o.factor
        x = x if o.offset is None else x + o.offset
    x = x if added is None or o.kind in (Kind.SCALE, Kind.CONCAT) else x + added
    x = x if o.shift is None else x + o.shift
    x = np.maximum(x, 0) if Flag.RELU in o.flags else x
    x = x if o.slope is None else np.where(x < 0, x * o.slope, x)
    return x if o.after is None else x + o.after


def _windows(o: Operation, x: Array, outside: float) -> Array:
    """Return [out height, out width, channels, kernel height, kernel width]."""
    height = (o.target.height - 1) * o.stride + o.kernel[0]
    width = (o.target.width - 1) * o.stride + o.kernel[1]
    padded = np.full((max(height, o.top + x.shape[0]), max(width, o.left + x.shape[1]), x.shape[2]), outside, x.dtype)
    padded[o.top : o.top + x.shape[0], o.left : o.left + x.shape[1]] = x
    return sliding_window_view(padded[:height, :width], o.kernel, (0, 1))[:: o.stride, :: o.stride]


def _convolved(o: Operation, x: Array, weight: Array, outside: float = 0) -> Array:
    """Sum over windows; weight [taps, channels, outputs]."""
    windows = _windows(o, x, outside)
    windows = windows.transpose(0, 1, 3, 4, 2).reshape(*windows.shape[:2], -1)
    return np.asarray(windows @ weight.reshape(-1, weight.shape[-1]))
