"""Kernels on packed bits for CPUs (binary_conv.c) as functions on tensors.

Activations are channels_last, float32 or bfloat16. A pixel is packed to whole 64-bit words of int64 tensors, least significant
bit first, bit 1 = +1. On the meta device the functions return tensors of the right sizes.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitfleet.c_library import CLibraryError, load_c_library

__all__ = [
    "ConvShape",
    "approx_gradient",
    "are_signs",
    "convolve",
    "empty_bits",
    "empty_input",
    "empty_output",
    "empty_signs",
    "has_kernels",
    "meta_is_cpu",
    "pack_input",
    "pack_weight",
    "ste_gradient",
    "transpose_taps",
    "unpack_input",
    "unpack_weight",
]

SOURCE = Path(__file__).with_name("binary_conv.c")
WORD, LANES = 64, 8
"""Channels in a word of packed bits, and output channels that lie next to each other in packed weights."""
MIN_SHARE = 32_768
"""Elements for which a thread is worth waking, as in torch."""


class ConvShape(NamedTuple):
    """Sizes of a convolution, in the order of `struct layer` of the source; `left` ... `bottom` is the zero padding."""

    images: int
    height: int
    width: int
    channels: int
    outputs: int
    out_height: int
    out_width: int
    kernel: int
    stride: int
    left: int
    right: int
    top: int
    bottom: int

    @property
    def words(self) -> int:
        """Words of a packed pixel."""
        return -(-self.channels // WORD)

    @property
    def blocks(self) -> int:
        """Blocks of output channels."""
        return -(-self.outputs // LANES)

    @property
    def padded_height(self) -> int:
        """Rows of the packed input."""
        return self.top + self.height + self.bottom

    @property
    def padded_width(self) -> int:
        """Columns of the packed input."""
        return self.left + self.width + self.right

    @property
    def is_symmetric(self) -> bool:
        """Whether torch's convolutions can pad by themselves."""
        return self.left == self.right and self.top == self.bottom


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ConvShape._fields]


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on `device`: a CPU with a C compiler, or "meta" inside `meta_is_cpu`."""
    if device.type == "cpu":
        return _library() is not None
    return device.type == "meta" and _meta_is_cpu and _library() is not None


_meta_is_cpu = False


@contextlib.contextmanager
def meta_is_cpu(enabled: bool) -> Iterator[None]:
    """Inside, networks on the meta device make the tensors that they would make on a CPU, if `enabled`."""
    global _meta_is_cpu
    before, _meta_is_cpu = _meta_is_cpu, enabled
    try:
        yield
    finally:
        _meta_is_cpu = before


@cache
def _library() -> ctypes.CDLL | None:
    """The functions of binary_conv.c, built on the first call in this process; None, after one warning, where that fails."""
    try:
        return load_c_library(SOURCE)
    except CLibraryError as error:
        warnings.warn(f"binary convolutions run on floats, several times slower: {error}", RuntimeWarning, 2)
        return None


def _call(name: str, shape: ConvShape, tensors: list[Tensor | None], *numbers: int) -> None:
    """Call a function of the source: the shape, threads, addresses of `tensors`, `numbers`. It trusts its pointers."""
    largest = max((tensor for tensor in tensors if tensor is not None), key=Tensor.numel)
    if largest.is_meta:
        return
    library = _library()
    assert library is not None
    num_threads = max(1, min(torch.get_num_threads(), largest.numel() // MIN_SHARE))
    pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    getattr(library, name)(ctypes.byref(_Layer(*shape)), num_threads, *pointers, *map(ctypes.c_int, numbers))


def _is_half(tensor: Tensor) -> bool:
    assert tensor.dtype in (torch.float32, torch.bfloat16)
    return tensor.dtype == torch.bfloat16


def _pixels(like: Tensor, images: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """A new channels_last tensor [images, channels, height, width]."""
    return like.new_empty((images, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def empty_signs(like: Tensor, shape: ConvShape) -> Tensor:
    """Memory for a packed input."""
    return like.new_empty((shape.images, shape.padded_height, shape.padded_width, shape.words), dtype=torch.int64)


def empty_bits(like: Tensor, shape: ConvShape) -> Tensor:
    """Memory for a packed weight."""
    return like.new_empty((shape.blocks, shape.kernel**2, shape.words, LANES), dtype=torch.int64)


def empty_input(like: Tensor, shape: ConvShape, dtype: torch.dtype, *, with_padding: bool) -> Tensor:
    """Memory for an input."""
    height, width = (shape.padded_height, shape.padded_width) if with_padding else (shape.height, shape.width)
    return _pixels(like, shape.images, shape.channels, height, width, dtype)


def empty_output(like: Tensor, shape: ConvShape, dtype: torch.dtype) -> Tensor:
    """Memory for an output."""
    return _pixels(like, shape.images, shape.outputs, shape.out_height, shape.out_width, dtype)


def pack_input(x: Tensor, shape: ConvShape, *, with_inside: bool) -> tuple[Tensor, Tensor | None]:
    """Pack signs, and where |x| <= 1.

    Args:
        x: [images, channels, height, width], channels_last.
        shape: of the convolution.
        with_inside: whether to make the second result.

    Returns:
        int64 [images, padded height, padded width, words], padding is 0; and int64 [images, height, width, words].
    """
    signs, inside = empty_signs(x, shape), None
    if with_inside:
        inside = x.new_empty((shape.images, shape.height, shape.width, shape.words), dtype=torch.int64)
    _call("pack_input", shape, [x, signs, inside], _is_half(x))
    return signs, inside


def pack_weight(weight: Tensor, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """Pack the signs of a weight.

    Args:
        weight: float32 [outputs, channels, kernel, kernel], contiguous.
        shape: of the convolution.

    Returns:
        int64 [blocks, kernel * kernel, words, LANES], and what `convolve` needs at borders, int64 [blocks, kernel * kernel,
        LANES].
    """
    bits = empty_bits(weight, shape)
    borders = weight.new_empty((shape.blocks, shape.kernel**2, LANES), dtype=torch.int64)
    _call("pack_weight", shape, [weight, bits, borders])
    return bits, borders


def are_signs(weight: Tensor) -> bool:
    """Whether every element of `weight`, float32 [outputs, channels, kernel, kernel] on a CPU or "meta", is +1 or -1."""
    outputs, channels, kernel, _ = weight.shape
    shape = ConvShape(0, 0, 0, channels, outputs, 0, 0, kernel, 1, 0, 0, 0, 0)
    others = torch.zeros(1, dtype=torch.int64)
    _call("find_others", shape, [weight.contiguous(), others])
    return not others.numpy()[0]


def convolve(signs: Tensor, weight: Tensor, borders: Tensor, shape: ConvShape, dtype: torch.dtype) -> Tensor:
    """Convolve packed signs with a packed weight: exact sums, rounded to `dtype`.

    Returns:
        `dtype` [images, outputs, out height, out width], channels_last.
    """
    out = empty_output(signs, shape, dtype)
    _call("convolve", shape, [signs, weight, borders, out], _is_half(out))
    return out


def unpack_input(signs: Tensor, shape: ConvShape, dtype: torch.dtype, *, with_padding: bool) -> Tensor:
    """Undo `pack_input`: `dtype` [images, channels, height, width], +-1, with a border of zeros if `with_padding`."""
    values = empty_input(signs, shape, dtype, with_padding=with_padding)
    _call("unpack_input", shape, [signs, values], with_padding, _is_half(values))
    return values


def unpack_weight(bits: Tensor, shape: ConvShape, dtype: torch.dtype) -> Tensor:
    """Undo `pack_weight`: `dtype` [outputs, channels, kernel, kernel], +-1, channels_last."""
    values = _pixels(bits, shape.outputs, shape.channels, shape.kernel, shape.kernel, dtype)
    _call("unpack_weight", shape, [bits, values], _is_half(values))
    return values


def transpose_taps(grad: Tensor, shape: ConvShape) -> Tensor:
    """Copy the gradient of a weight, channels_last, to float32 and the layout of the weight.

    (A gradient of another layout would be copied by autograd, four times as slowly.)
    """
    result = grad.new_empty(grad.shape, dtype=torch.float32)
    _call("transpose_taps", shape, [grad, result], _is_half(grad))
    return result


def ste_gradient(inside: Tensor, grad: Tensor, shape: ConvShape) -> Tensor:
    """`quantizers.pseudo_gradient` of "ste".

    Args:
        inside: of `pack_input`.
        grad: [images, channels, padded height, padded width], channels_last; what it has on padding is left out.
        shape: of the convolution.
    """
    out = empty_input(grad, shape, grad.dtype, with_padding=False)
    _call("ste_gradient", shape, [inside, grad, out], _is_half(grad))
    return out


def approx_gradient(x: Tensor, grad: Tensor, shape: ConvShape) -> Tensor:
    """`quantizers.pseudo_gradient` of "approx"; `x` in the dtype of `grad`, else as `ste_gradient`."""
    out = torch.empty_like(x)
    _call("approx_gradient", shape, [x, grad, out], _is_half(grad))
    return out
