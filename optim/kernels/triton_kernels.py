"""Triton kernels for packed weights on a GPU: one pass over memory for the update of a slice, for
packing and for unpacking.

The arithmetic of `kernels.c`, operation by operation: no fused multiply-add
(`enable_fp_fusion=False`), correctly rounded division and square root, so the bits are those of the
CPU. Rates, threshold and divisors are read from device memory, as is the flag that says whether to
update at all: a launch depends on no value that the host would have to wait for, and a CUDA graph
can hold it. Run under TRITON_INTERPRET=1 the same kernels work on CPU tensors, which is how they
are tested without a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_pack", "launch_unpack", "launch_update"]

BLOCK = 1024
"""Weights per program: 128 bytes of bits, 4 KiB of each fp32 tensor."""


@triton.jit
def _update(
    bits,
    grad,
    exp_avg,
    exp_avg_sq,
    gamma,
    sigma,
    threshold,
    divisor,
    divisor_sq,
    finite,
    num_bytes,
    eps,
    BF16: tl.constexpr,
    SECOND: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A step whose gradients are not finite anywhere changes nothing.
    if tl.load(finite) != 0:
        byte = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        bit = tl.arange(0, 8)
        inside = byte < num_bytes
        index = byte[:, None] * 8 + bit[None, :]
        mask = inside[:, None]
        limit = tl.load(threshold)
        g = tl.load(grad + index, mask=mask, other=0)
        if BF16:  # the upper half of an fp32, which Triton's interpreter converts by rounding denormals to 0
            g = (g.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        m = tl.load(exp_avg + index, mask=mask, other=0.0)
        m = m + (g - m) * tl.load(gamma)
        tl.store(exp_avg + index, m, mask=mask)
        ratio = m
        if SECOND:
            v = tl.load(exp_avg_sq + index, mask=mask, other=0.0)
            v = v + (g * g - v) * tl.load(sigma)
            tl.store(exp_avg_sq + index, v, mask=mask)
            if CORRECTED:
                ratio = tl.div_rn(ratio, tl.load(divisor))
                v = tl.div_rn(v, tl.load(divisor_sq))
            ratio = tl.div_rn(ratio, tl.sqrt_rn(v) + eps)
        place = (1 << bit)[None, :]
        positive = tl.sum(tl.where(ratio > limit, place, 0), 1)
        stays = tl.sum(tl.where(-ratio < limit, place, 0), 1)
        old = tl.load(bits + byte, mask=inside, other=0).to(tl.int32)
        # A -1 stays only where -ratio < threshold holds: an exact tie and a NaN become +1.
        new = (old & (255 - positive)) | (255 - stays)
        tl.store(bits + byte, new.to(tl.uint8), mask=inside)


@triton.jit
def _pack(weights, bits, num_bytes, BLOCK: tl.constexpr):
    byte = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)
    inside = byte < num_bytes
    index = byte[:, None] * 8 + bit[None, :]
    w = tl.load(weights + index, mask=inside[:, None], other=0.0)
    tl.store(bits + byte, tl.sum(tl.where(w >= 0, (1 << bit)[None, :], 0), 1).to(tl.uint8), mask=inside)


@triton.jit
def _unpack(bits, weights, num_bytes, BLOCK: tl.constexpr):
    byte = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)
    inside = byte < num_bytes
    packed = tl.load(bits + byte, mask=inside, other=0).to(tl.int32)
    sign = ((packed[:, None] >> bit[None, :]) & 1) * 2 - 1
    index = byte[:, None] * 8 + bit[None, :]
    tl.store(weights + index, sign.to(tl.float32).to(weights.dtype.element_ty), mask=inside[:, None])


def _grid(num_bytes: int) -> tuple[int]:
    assert 8 * num_bytes < 2**31, num_bytes  # indices are int32
    return (triton.cdiv(8 * num_bytes, BLOCK),)


def _options(tensor: Tensor) -> dict[str, Any]:
    return {"enable_fp_fusion": False} if tensor.is_cuda else {}  # the interpreter knows no such option


def launch_update(
    bits: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor | None,
    *,
    gamma: Tensor,
    sigma: Tensor,
    threshold: Tensor,
    divisors: tuple[Tensor, Tensor] | None,
    finite: Tensor,
    eps: float,
) -> None:
    """Update a slice of packed weights and its moments in place, unless `finite` is 0.

    Args:
        bits: uint8 [n / 8], contiguous.
        grad: fp32 or bf16 [n], contiguous.
        exp_avg: fp32 [n], contiguous.
        exp_avg_sq: fp32 [n], contiguous; None for Bop, whose ratio is its only moment.
        gamma: fp32 [], rate of the first moment.
        sigma: fp32 [], rate of the second moment.
        threshold: fp32 [].
        divisors: fp32 [] each, of the two moments; None without a correction.
        finite: bool or integer [].
        eps: added to the root of the second moment.
    """
    num_bytes, is_bf16 = bits.numel(), grad.dtype == torch.bfloat16
    second = exp_avg if exp_avg_sq is None else exp_avg_sq
    first_divisor, second_divisor = (gamma, gamma) if divisors is None else divisors
    _update[_grid(num_bytes)](
        bits,
        grad.view(torch.int16) if is_bf16 else grad,
        exp_avg,
        second,
        gamma,
        sigma,
        threshold,
        first_divisor,
        second_divisor,
        finite,
        num_bytes,
        eps,
        BF16=is_bf16,
        SECOND=exp_avg_sq is not None,
        CORRECTED=divisors is not None,
        BLOCK=BLOCK,
        **_options(bits),
    )


def launch_pack(weights: Tensor, bits: Tensor) -> None:
    """Write the signs of `weights`, floats [n], into `bits`, uint8 [n / 8]: 1 where they are >= 0;
    a NaN packs as -1."""
    _pack[_grid(bits.numel())](weights, bits, bits.numel(), BLOCK=BLOCK)


def launch_unpack(bits: Tensor, weights: Tensor) -> None:
    """Write the weights that `bits`, uint8 [n / 8], stand for into `weights`, floats [n]."""
    _unpack[_grid(bits.numel())](bits, weights, bits.numel(), BLOCK=BLOCK)
