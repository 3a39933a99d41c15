"""Binary convolutions on a CPU: packed bits in the forward pass, and packed bits kept for backward.

A product of two signs is an exclusive-or and a sum of them a population count, so the forward pass
takes a tenth of the time of a float convolution (with AVX-512; a third with AVX2) and gives the
same bits, because all sums are integers. Backward convolves float gradients with torch. Without a C
compiler, layers.py convolves floats both ways.

The convolution and its backward are torch operators, `bitfleet::binary_conv2d` and
`bitfleet::binary_conv2d_backward`, so torch.compile includes them in its graphs. The functions
after them call the kernels of binary_conv.c. Activations are channels_last, float32 or bfloat16. A
pixel is packed to whole 64-bit words of int64 tensors, least significant bit first, bit 1 = +1; on
the meta device the functions return tensors of the right sizes.

Models and optimizers do not import each other, so optim/kernels repeats a little of this: MIN_SHARE
and the number of threads (kernels.py), the order of bits (bits.py), `load` in the C source
(kernels.c). Change both together.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bitfleet.c_library import CLibraryError, load_c_library
from bitfleet.models.layers.quantizers import LIMITS, Binarizer, Quantizer, binarizer_of, pseudo_gradient
from bitfleet.models.layers.real_layers import Padding

SOURCE = Path(__file__).with_name("binary_conv.c")
WORD, LANES = 64, 8
"""Channels per word of packed bits, and output channels that are adjacent in packed weights."""
MIN_SHARE = 32_768
"""Elements that justify one more thread, as in torch."""


class ConvShape(NamedTuple):
    """Sizes of a convolution, ordered as `struct layer` in C.

    `left` ... `bottom` is padding: with zeros, or with +1 if `ones` is 1.
    """

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
    ones: int = 0

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
    def torch_pads(self) -> bool:
        """Return True if torch's convolutions can apply the padding."""
        return self.left == self.right and self.top == self.bottom and not self.ones


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ConvShape._fields]


def can_pack(x: Tensor, weight: Tensor, quantizer: Quantizer) -> bool:
    """Return True for channels_last fp32 or bf16 on a CPU, a known quantizer and +-1 weights.

    The rule bnew trains real weights. Compiled code cannot test that here; `_forward` does.
    Subclasses of tensors may have no memory that C could read (FakeTensor).
    """
    return (
        _has_kernels(x.device)
        and weight.device == x.device
        and x.dim() == 4
        # Operators on the meta device lose channels_last where those on a CPU keep it.
        and (x.is_meta or x.is_contiguous(memory_format=torch.channels_last))
        and weight.dtype == torch.float32
        and {x.dtype, _out_dtype(x)} <= {torch.float32, torch.bfloat16}
        and binarizer_of(quantizer) is not None
        and (torch.compiler.is_compiling() or (type(x) in (Tensor, nn.Parameter) and are_signs(weight.detach())))
    )


def binary_conv2d(
    x: Tensor, weight: Tensor, stride: int, padding: Padding, quantizer: Quantizer, pad_value: float = 0.0
) -> Tensor:
    """Compute the bits of `conv2d(quantizer(x), weight, stride, padding, pad_value)` and gradients.

    Args:
        x: [N, C, H, W], accepted by `can_pack`.
        weight: float32 [out, C, kernel, kernel], every element +1 or -1.
        stride: in both directions.
        padding: around the signs.
        quantizer: from quantizers.py.
        pad_value: 0 or 1.

    Returns:
        [N, out, H', W'], channels_last, in the autocast dtype if autocast is on.

    Raises:
        ValueError: the padded input is smaller than the kernel.
    """
    images, channels, height, width = x.shape
    outputs, _, kernel, _ = weight.shape
    out_height = (height + padding.top + padding.bottom - kernel) // stride + 1
    out_width = (width + padding.left + padding.right - kernel) // stride + 1
    if min(out_height, out_width) < 1:
        raise ValueError(
            f"a kernel of {kernel}x{kernel} pixels does not fit an input {list(x.shape)} padded by {padding}"
        )
    sizes = (images, height, width, channels, outputs, out_height, out_width, kernel, stride)
    shape = ConvShape(*sizes, *padding, int(pad_value))
    result: Tensor = _BinaryConv2d.apply(x, weight, shape, _out_dtype(x), binarizer_of(quantizer))
    return result


def _out_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _BinaryConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shape: ConvShape, dtype: torch.dtype, binarizer: Binarizer
    ) -> Tensor:
        out: Tensor
        if torch.compiler.is_compiling():
            out, signs, bits = _forward_op(x, weight, shape, dtype)
            kept = x
        else:
            # A mask is one bit of an element; the other pseudo-gradients need all of it.
            limit = LIMITS.get(binarizer) if ctx.needs_input_grad[0] else None
            signs, inside = pack_input(x, shape, limit)
            bits, borders = pack_weight(weight.contiguous(), shape)
            out = convolve(signs, bits, borders, shape, dtype)
            kept = x if inside is None else inside
        ctx.save_for_backward(signs, bits, kept if ctx.needs_input_grad[0] else None)
        ctx.shape, ctx.binarizer, ctx.dtype = shape, binarizer, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        signs, bits, kept = ctx.saved_tensors
        shape, (needs_x, needs_weight, *_) = ConvShape(*ctx.shape), ctx.needs_input_grad
        grad_x = None
        if torch.compiler.is_compiling():
            grad_signs, grad_weight = _backward_op(grad, signs, bits, shape, needs_x, needs_weight)
            if needs_x:
                grad_x = pseudo_gradient(ctx.binarizer, kept, _cropped(grad_signs, shape).to(ctx.dtype))
        else:
            grad_signs, grad_weight = _backward(grad, signs, bits, shape, needs_x, needs_weight)
            if needs_x:
                grad_x = _through_sign(ctx.binarizer, kept, grad_signs.to(ctx.dtype), shape)
        return grad_x, grad_weight if needs_weight else None, None, None, None


def _forward(x: Tensor, weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, packed input and packed weight."""
    sizes = ConvShape(*shape)
    if not are_signs(weight):
        raise ValueError(
            "a compiled binary convolution got weights other than +1 and -1, as the rule bnew trains them: "
            "use --model.compile off"
        )
    signs, _ = pack_input(x.contiguous(memory_format=torch.channels_last), sizes)
    bits, borders = pack_weight(weight.contiguous(), sizes)
    return convolve(signs, bits, borders, sizes, dtype), signs, bits


def _backward(
    grad: Tensor, signs: Tensor, bits: Tensor, shape: Sequence[int], needs_signs: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the (padded) signs and of the weight; empty if not needed."""
    sizes = ConvShape(*shape)
    dtype = grad.dtype  # that of the forward pass, whether or not autocast chose it
    grad_signs, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        unpack_input(signs, sizes, dtype, with_padding=not sizes.torch_pads),
        unpack_weight(bits, sizes, dtype),
        None,
        (sizes.stride, sizes.stride),
        (sizes.top, sizes.left) if sizes.torch_pads else (0, 0),
        (1, 1),
        False,
        (0, 0),
        1,
        (needs_signs, needs_weight, False),
    )
    empty = grad.new_empty(0)
    return grad_signs if needs_signs else empty, transpose_taps(grad_weight, sizes) if needs_weight else empty


def _cropped(grad_signs: Tensor, shape: ConvShape) -> Tensor:
    """Remove what an asymmetric padding added."""
    if shape.torch_pads:
        return grad_signs
    return grad_signs[:, :, shape.top : shape.top + shape.height, shape.left : shape.left + shape.width]


def _through_sign(binarizer: Binarizer, kept: Tensor, grad_signs: Tensor, shape: ConvShape) -> Tensor:
    """Compute the pseudo-gradient, by a kernel if there is one."""
    if shape.torch_pads:
        shape = shape._replace(left=0, right=0, top=0, bottom=0)
    if binarizer in LIMITS:
        return ste_gradient(kept, grad_signs, shape)
    if binarizer == "approx":
        return approx_gradient(kept, grad_signs, shape)
    return pseudo_gradient(binarizer, kept, _cropped(grad_signs, shape))


_forward_op = torch.library.custom_op("bitfleet::binary_conv2d", _forward, mutates_args=())
_backward_op = torch.library.custom_op("bitfleet::binary_conv2d_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ConvShape(*shape)
    return empty_output(x, sizes, dtype), empty_signs(x, sizes), empty_bits(x, sizes)


@_backward_op.register_fake
def _(
    grad: Tensor, signs: Tensor, bits: Tensor, shape: Sequence[int], needs_signs: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    sizes, empty = ConvShape(*shape), grad.new_empty(0)
    weight = grad.new_empty((sizes.outputs, sizes.channels, sizes.kernel, sizes.kernel), dtype=torch.float32)
    grad_signs = empty_input(grad, sizes, grad.dtype, with_padding=not sizes.torch_pads)
    return grad_signs if needs_signs else empty, weight if needs_weight else empty


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    """Return True on a CPU with a C compiler, and on "meta" inside `meta_is_cpu`."""
    if device.type == "cpu":
        return _library() is not None
    return device.type == "meta" and _meta_is_cpu and _library() is not None


_meta_is_cpu = False


@contextlib.contextmanager
def meta_is_cpu(enabled: bool) -> Iterator[None]:
    """If `enabled`, let networks on the meta device create the tensors that they would on a CPU."""
    global _meta_is_cpu
    before, _meta_is_cpu = _meta_is_cpu, enabled
    try:
        yield
    finally:
        _meta_is_cpu = before


@cache
def _library() -> ctypes.CDLL | None:
    """Build binary_conv.c on the first call; warn once and return None if that fails."""
    try:
        return load_c_library(SOURCE)
    except CLibraryError as error:
        warnings.warn(f"binary convolutions run on floats, several times slower: {error}", RuntimeWarning, 2)
        return None


def _call(name: str, shape: ConvShape, tensors: list[Tensor | None], *numbers: int | ctypes.c_float) -> None:
    """Call a C function with shape, threads, pointers to `tensors`, and `numbers`, unchecked."""
    largest = max((tensor for tensor in tensors if tensor is not None), key=Tensor.numel)
    if largest.is_meta:
        return
    library = _library()
    assert library is not None
    num_threads = max(1, min(torch.get_num_threads(), largest.numel() // MIN_SHARE))
    pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    values = [ctypes.c_int(number) if isinstance(number, int) else number for number in numbers]
    getattr(library, name)(ctypes.byref(_Layer(*shape)), num_threads, *pointers, *values)


def _is_half(tensor: Tensor) -> bool:
    assert tensor.dtype in (torch.float32, torch.bfloat16)
    return tensor.dtype == torch.bfloat16


def _pixels(like: Tensor, images: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Allocate a channels_last tensor [images, channels, height, width]."""
    return like.new_empty((images, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def empty_signs(like: Tensor, shape: ConvShape) -> Tensor:
    """Allocate a packed input."""
    return like.new_empty((shape.images, shape.padded_height, shape.padded_width, shape.words), dtype=torch.int64)


def empty_bits(like: Tensor, shape: ConvShape) -> Tensor:
    """Allocate a packed weight."""
    return like.new_empty((shape.blocks, shape.kernel**2, shape.words, LANES), dtype=torch.int64)


def empty_input(like: Tensor, shape: ConvShape, dtype: torch.dtype, *, with_padding: bool) -> Tensor:
    """Allocate an input."""
    height, width = (shape.padded_height, shape.padded_width) if with_padding else (shape.height, shape.width)
    return _pixels(like, shape.images, shape.channels, height, width, dtype)


def empty_output(like: Tensor, shape: ConvShape, dtype: torch.dtype) -> Tensor:
    """Allocate an output."""
    return _pixels(like, shape.images, shape.outputs, shape.out_height, shape.out_width, dtype)


def pack_input(x: Tensor, shape: ConvShape, limit: float | None = None) -> tuple[Tensor, Tensor | None]:
    """Pack signs, and optionally the mask |x| <= limit.

    Args:
        x: [images, channels, height, width], channels_last.
        shape: of the convolution.
        limit: None: without the mask.

    Returns:
        int64 [images, padded height, padded width, words], bits of padding with zeros are 0; and
        int64 [images, height, width, words].
    """
    signs, inside = empty_signs(x, shape), None
    if limit is not None:
        inside = x.new_empty((shape.images, shape.height, shape.width, shape.words), dtype=torch.int64)
    _call("pack_input", shape, [x, signs, inside], _is_half(x), ctypes.c_float(limit or 0.0))
    return signs, inside


def pack_weight(weight: Tensor, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """Pack the signs of a weight.

    Args:
        weight: float32 [outputs, channels, kernel, kernel], contiguous.
        shape: of the convolution.

    Returns:
        int64 [blocks, kernel * kernel, words, LANES], and what `convolve` needs at borders, int64
        [blocks, kernel * kernel, LANES].
    """
    bits = empty_bits(weight, shape)
    borders = weight.new_empty((shape.blocks, shape.kernel**2, LANES), dtype=torch.int64)
    _call("pack_weight", shape, [weight, bits, borders])
    return bits, borders


def are_signs(weight: Tensor) -> bool:
    """Return True if all of `weight`, float32 [outputs, channels, kernel, kernel], is +1 or -1."""
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
    """Undo `pack_input`: +-1, or 0 of padding, as `dtype` [images, channels, height, width]."""
    values = empty_input(signs, shape, dtype, with_padding=with_padding)
    _call("unpack_input", shape, [signs, values], with_padding, _is_half(values))
    return values


def unpack_weight(bits: Tensor, shape: ConvShape, dtype: torch.dtype) -> Tensor:
    """Undo `pack_weight`: `dtype` [outputs, channels, kernel, kernel], +-1, channels_last."""
    values = _pixels(bits, shape.outputs, shape.channels, shape.kernel, shape.kernel, dtype)
    _call("unpack_weight", shape, [bits, values], _is_half(values))
    return values


def transpose_taps(grad: Tensor, shape: ConvShape) -> Tensor:
    """Copy the gradient of a weight from channels_last to float32 in the layout of the weight.

    Autograd would copy a gradient of another layout four times as slowly.
    """
    result = grad.new_empty(grad.shape, dtype=torch.float32)
    _call("transpose_taps", shape, [grad, result], _is_half(grad))
    return result


def ste_gradient(inside: Tensor, grad: Tensor, shape: ConvShape) -> Tensor:
    """Compute `quantizers.pseudo_gradient` for a quantizer in LIMITS.

    Args:
        inside: mask of `pack_input`.
        grad: [images, channels, padded height, padded width], channels_last; values on padding are
            dropped.
        shape: of the convolution.
    """
    out = empty_input(grad, shape, grad.dtype, with_padding=False)
    _call("ste_gradient", shape, [inside, grad, out], _is_half(grad))
    return out


def approx_gradient(x: Tensor, grad: Tensor, shape: ConvShape) -> Tensor:
    """Compute `quantizers.pseudo_gradient` for "approx", with `x` in the dtype of `grad`."""
    out = torch.empty_like(x)
    _call("approx_gradient", shape, [x, grad, out], _is_half(grad))
    return out
