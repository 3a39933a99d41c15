"""Binary convolutions on a CPU: packed bits in the forward pass, and kept as such until backward.

A product of two signs is an exclusive-or and a sum of them a population count, so the forward pass takes a tenth of the time of a
float convolution (with AVX-512; a third with AVX2) and gives the same bits, because all sums are integers. Backward convolves
float gradients, through torch. Without a C compiler, layers.py convolves floats in both directions.

The kernels are operators of torch, `bitfleet::binary_conv2d` and its backward, so torch.compile takes them into its graphs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitfleet.models.layers import binary_kernels as kernels
from bitfleet.models.layers.binary_kernels import ConvShape
from bitfleet.models.layers.quantizers import Binarizer, Quantizer, binarizer_of, pseudo_gradient
from bitfleet.models.layers.same_padding import Padding

__all__ = ["binary_conv2d", "can_pack"]


def can_pack(x: Tensor, weight: Tensor, quantizer: Quantizer) -> bool:
    """Whether `binary_conv2d` takes these: on a CPU, float32 or bfloat16, channels_last, a quantizer of quantizers.py.

    And +-1 weights: the rule bnew trains real ones. Compiled code cannot ask, see `_convolve`.
    """
    return (
        _has_kernels(x.device)
        and x.dim() == 4
        # Operators on the meta device lose channels_last where those of a CPU keep it.
        and (x.is_meta or x.is_contiguous(memory_format=torch.channels_last))
        and weight.dtype == torch.float32
        and {x.dtype, _out_dtype(x)} <= {torch.float32, torch.bfloat16}
        and binarizer_of(quantizer) is not None
        and (torch.compiler.is_compiling() or kernels.are_signs(weight.detach()))
    )


def binary_conv2d(x: Tensor, weight: Tensor, stride: int, padding: Padding, quantizer: Quantizer) -> Tensor:
    """`conv2d(quantizer(x), weight, stride, padding)`, with the same bits in output and gradients.

    Args:
        x: [N, C, H, W], for which `can_pack` holds.
        weight: float32 [out, C, kernel, kernel], every element +1 or -1.
        stride: step in both directions.
        padding: zeros around the signs.
        quantizer: one of quantizers.py.

    Returns:
        [N, out, H', W'], channels_last, in the autocast dtype where autocast is on.
    """
    images, channels, height, width = x.shape
    outputs, _, kernel, _ = weight.shape
    out_height = (height + padding.top + padding.bottom - kernel) // stride + 1
    out_width = (width + padding.left + padding.right - kernel) // stride + 1
    shape = ConvShape(images, height, width, channels, outputs, out_height, out_width, kernel, stride, *padding)
    result: Tensor = _BinaryConv2d.apply(x, weight, shape, _out_dtype(x), binarizer_of(quantizer))
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    return kernels.has_kernels(device)


def _out_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class _BinaryConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, shape: ConvShape, dtype: torch.dtype, binarizer: Binarizer
    ) -> Tensor:
        out: Tensor
        if torch.compiler.is_compiling():
            out, signs, bits = _convolve_op(x, weight, shape, dtype)
            kept = x
        else:
            # "ste" needs a bit of an element, the other pseudo-gradients every bit of it.
            signs, inside = kernels.pack_input(x, shape, with_inside=binarizer == "ste" and ctx.needs_input_grad[0])
            bits, borders = kernels.pack_weight(weight.contiguous(), shape)
            out = kernels.convolve(signs, bits, borders, shape, dtype)
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
            grad_signs, grad_weight = _gradients_op(grad, signs, bits, shape, needs_x, needs_weight)
            if needs_x:
                grad_x = pseudo_gradient(ctx.binarizer, kept, _cropped(grad_signs, shape).to(ctx.dtype))
        else:
            grad_signs, grad_weight = _gradients(grad, signs, bits, shape, needs_x, needs_weight)
            if needs_x:
                grad_x = _through_sign(ctx.binarizer, kept, grad_signs.to(ctx.dtype), shape)
        return grad_x, grad_weight if needs_weight else None, None, None, None


def _convolve(x: Tensor, weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Output, packed input and packed weight."""
    sizes = ConvShape(*shape)
    if not kernels.are_signs(weight):
        raise ValueError(
            "a compiled binary convolution got weights other than +1 and -1, as the rule bnew trains them: "
            "use --model.compile off"
        )
    signs, _ = kernels.pack_input(x.contiguous(memory_format=torch.channels_last), sizes, with_inside=False)
    bits, borders = kernels.pack_weight(weight.contiguous(), sizes)
    return kernels.convolve(signs, bits, borders, sizes, dtype), signs, bits


def _gradients(
    grad: Tensor, signs: Tensor, bits: Tensor, shape: Sequence[int], needs_signs: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the signs, with padding if that is asymmetric, and of the weight; empty where not needed."""
    sizes = ConvShape(*shape)
    dtype = grad.dtype  # that of the forward convolution, whether or not autocast chose it
    grad_signs, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        kernels.unpack_input(signs, sizes, dtype, with_padding=not sizes.is_symmetric),
        kernels.unpack_weight(bits, sizes, dtype),
        None,
        (sizes.stride, sizes.stride),
        (sizes.top, sizes.left) if sizes.is_symmetric else (0, 0),
        (1, 1),
        False,
        (0, 0),
        1,
        (needs_signs, needs_weight, False),
    )
    empty = grad.new_empty(0)
    return grad_signs if needs_signs else empty, kernels.transpose_taps(grad_weight, sizes) if needs_weight else empty


def _cropped(grad_signs: Tensor, shape: ConvShape) -> Tensor:
    """Without what an asymmetric padding added."""
    if shape.is_symmetric:
        return grad_signs
    return grad_signs[:, :, shape.top : shape.top + shape.height, shape.left : shape.left + shape.width]


def _through_sign(binarizer: Binarizer, kept: Tensor, grad_signs: Tensor, shape: ConvShape) -> Tensor:
    """The pseudo-gradient, by a kernel where there is one."""
    if shape.is_symmetric:
        shape = shape._replace(left=0, right=0, top=0, bottom=0)
    if binarizer == "ste":
        return kernels.ste_gradient(kept, grad_signs, shape)
    if binarizer == "approx":
        return kernels.approx_gradient(kept, grad_signs, shape)
    return pseudo_gradient(binarizer, kept, _cropped(grad_signs, shape))


_convolve_op = torch.library.custom_op("bitfleet::binary_conv2d", _convolve, mutates_args=())
_gradients_op = torch.library.custom_op("bitfleet::binary_conv2d_backward", _gradients, mutates_args=())


@_convolve_op.register_fake
def _(x: Tensor, weight: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ConvShape(*shape)
    return kernels.empty_output(x, sizes, dtype), kernels.empty_signs(x, sizes), kernels.empty_bits(x, sizes)


@_gradients_op.register_fake
def _(
    grad: Tensor, signs: Tensor, bits: Tensor, shape: Sequence[int], needs_signs: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    sizes, empty = ConvShape(*shape), grad.new_empty(0)
    weight = grad.new_empty((sizes.outputs, sizes.channels, sizes.kernel, sizes.kernel), dtype=torch.float32)
    grad_signs = kernels.empty_input(grad, sizes, grad.dtype, with_padding=not sizes.is_symmetric)
    return grad_signs if needs_signs else empty, weight if needs_weight else empty
