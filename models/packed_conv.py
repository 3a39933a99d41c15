"""Convolution of a +-1 input that keeps the input as bits until backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bitfleet.models.bits import pack_bits, unpack_bits
from bitfleet.models.same_padding import Padding, conv2d

__all__ = ["packed_conv2d"]


def packed_conv2d(signs: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    """`conv2d` with the same bits in output and gradients, and 1/32 of the memory for the saved input.

    Args:
        signs: [N, C, H, W], every element +1 or -1.
        weight: [out, C, kernel height, kernel width].
        stride: step in both directions.
        padding: zeros around `signs`; they are padded again in backward, so that two values are enough to save.

    Returns:
        [N, out, H', W'], in the autocast dtype where autocast is on.
    """
    result: Tensor = _PackedConv2d.apply(signs, weight, stride, padding)
    return result


class _PackedConv2d(torch.autograd.Function):
    # A Function and not saved_tensors_hooks around F.conv2d: hooks do not nest, so they would disable the caller's
    # (activation checkpointing, offloading) for this layer.
    @staticmethod
    def forward(ctx: Any, signs: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
        bits = None
        if ctx.needs_input_grad[1]:
            bits, ctx.layout = pack_bits(signs > 0)
        ctx.save_for_backward(bits, weight)
        ctx.input_shape, ctx.input_dtype = signs.shape, signs.dtype
        ctx.stride, ctx.padding = stride, padding
        return conv2d(signs, weight, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        bits, weight = ctx.saved_tensors
        padding, needs_signs, needs_weight = ctx.padding, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        # grad.dtype is the dtype the forward convolution ran in, whether or not autocast chose it.
        if needs_weight:
            signs = unpack_bits(bits, ctx.layout, low=-1.0, high=1.0, dtype=grad.dtype)
        else:
            signs = grad.new_empty(1).expand(ctx.input_shape)  # only its shape is read
        inner = (padding.top, padding.left) if padding.is_symmetric else (0, 0)
        if not padding.is_symmetric:
            signs = F.pad(signs, padding)
        grad_signs, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            signs,
            weight.to(grad.dtype),
            None,
            (ctx.stride, ctx.stride),
            inner,
            (1, 1),
            False,
            (0, 0),
            1,
            (needs_signs, needs_weight, False),
        )
        if needs_signs:
            if not padding.is_symmetric:
                grad_signs = F.pad(grad_signs, [-side for side in padding])
            grad_signs = grad_signs.to(ctx.input_dtype)
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_signs, grad_weight, None, None
