"""Binary weights as bits, eight a byte, least significant bit first, bit 1 = +1: what ranks
exchange and slices store.

On the CPU the kernels of kernels.c do the work (fp32 and bf16), on a GPU those of
triton_kernels.py; other types, and machines without a compiler, take a multiply-and-gather to pack
and a table of 256 x 8 values to unpack. All give the same bits and values.
"""

from functools import cache

import torch
from torch import Tensor, nn

from bitfleet.optim.kernels.kernels import kernel_library, num_threads, on_gpu, pack_flags

__all__ = ["pack_signs", "popcount", "unpack_changed", "unpack_signs"]


def pack_signs(weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Pack the signs of `weights`: 1 where they are >= 0, so sign(0) = sign(-0) = +1; a NaN packs
    as -1.

    Args:
        weights: fp32, bf16 or fp64 [n], contiguous, n a multiple of 8.
        out: uint8 [n / 8], contiguous, on the same device; a new tensor if None.

    Returns:
        `out`.
    """
    if out is None:
        out = torch.empty(weights.numel() // 8, dtype=torch.uint8, device=weights.device)
    _check(out, weights, "weights")
    packed = out
    if weights.is_cuda and on_gpu(lambda triton: triton.launch_pack(weights, packed)):
        return out
    built = kernel_library() if _has_kernel(weights) else None
    if built is None:
        return out.copy_(pack_flags(weights >= 0))
    numel = weights.numel()
    is_bf16 = weights.dtype == torch.bfloat16
    built.pack(numel, num_threads(numel), weights.data_ptr(), is_bf16, out.data_ptr())
    return out


@torch.no_grad()
def unpack_signs(bits: Tensor, out: Tensor) -> Tensor:
    """Write the weights that `bits` stand for, +-1, into `out`.

    Args:
        bits: uint8 [n / 8], contiguous.
        out: fp32, bf16 or fp64 [n], contiguous, on the same device.

    Returns:
        `out`.
    """
    _check(bits, out, "out")
    if out.is_cuda and on_gpu(lambda triton: triton.launch_unpack(bits, out)):
        return out
    built = kernel_library() if _has_kernel(out) else None
    if built is None:
        torch.index_select(_table(out.dtype, out.device), 0, bits.int(), out=out.view(-1, 8))
        return out
    numel = out.numel()
    built.unpack(numel, num_threads(numel), bits.data_ptr(), out.dtype == torch.bfloat16, out.data_ptr())
    return out


@torch.no_grad()
def unpack_changed(changed: Tensor, bits: Tensor, out: Tensor) -> Tensor:
    """Write the weights that `bits` stand for into `out`, which holds them already where `changed`
    is 0.

    Args:
        changed: uint8 [n / 8], contiguous: 1 for weights that differ.
        bits: uint8 [n / 8], contiguous.
        out: fp32, bf16 or fp64 [n], contiguous, on the same device.

    Returns:
        `out`.
    """
    _check(bits, out, "out")
    _check(changed, out, "out")
    built = kernel_library() if _has_kernel(out) else None
    if built is None:
        return unpack_signs(bits, out)
    numel, is_bf16 = out.numel(), out.dtype == torch.bfloat16
    built.unpack_changed(numel, num_threads(numel), changed.data_ptr(), bits.data_ptr(), is_bf16, out.data_ptr())
    return out


def _check(bits: Tensor, weights: Tensor, name: str) -> None:
    numel = weights.numel()
    if weights.shape != (numel,) or numel % 8 or not weights.is_contiguous() or not weights.is_floating_point():
        raise ValueError(
            f"{name} must be floats, flat, contiguous and of a multiple of 8 elements, not {list(weights.shape)} with "
            f"strides {list(weights.stride())} of {weights.dtype}"
        )
    if bits.shape != (numel // 8,) or bits.dtype != torch.uint8 or not bits.is_contiguous():
        raise ValueError(
            f"bits must be contiguous, of shape [{numel // 8}] and type torch.uint8, not {list(bits.shape)} with "
            f"strides {list(bits.stride())} of {bits.dtype}"
        )
    if bits.device != weights.device:
        raise ValueError(f"bits are on {bits.device}, {name} on {weights.device}")


def _has_kernel(weights: Tensor) -> bool:
    return weights.device.type == "cpu" and weights.dtype in (torch.float32, torch.bfloat16)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: row b holds the weights of byte b."""
    byte = torch.arange(256, device=device).unsqueeze(1)
    bit = (byte >> torch.arange(8, device=device)) & 1
    return torch.where(bit == 1, 1.0, -1.0).to(dtype)


def popcount(packed: Tensor) -> Tensor:
    """Count the bits of `packed` that are 1, without the wait for the device that torch.bincount
    has.

    Args:
        packed: uint8 [n], contiguous; a view into another tensor starts at a multiple of 8 of its
            bytes.

    Returns:
        int64 [].
    """
    whole = packed if packed.numel() % 8 == 0 else nn.functional.pad(packed, (0, -packed.numel() % 8))
    words = whole.view(torch.int64)  # shifts carry the sign along; every mask drops it
    words = words - (words >> 1).bitwise_and_(0x5555555555555555)
    quarters = (words >> 2).bitwise_and_(0x3333333333333333)
    words.bitwise_and_(0x3333333333333333).add_(quarters)
    words.add_(words >> 4).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return words.mul_(0x0101010101010101).bitwise_right_shift_(56).sum()
