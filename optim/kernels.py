"""Flip rules on packed signs: the update of a slice whose weights exist as bits only.

A bit-flipping step is bound by memory, and a +-1 weight needs no more than a bit of it: 20.25 bytes a weight with fp32
gradients, 18.25 with bf16, against 28 of a rule on fp32 weights. Where the arithmetic runs:

- CPU: kernels.c, compiled by the system's C compiler at first use (bitfleet/c_library.py).
- CPU without a compiler: the same in eager torch, chunk by chunk. One warning says so.
- Other devices: the same through torch.compile, one graph for all sizes and schedules.

Bits are least significant first, bit 1 = +1. On the CPU every path gives the bits of bop_step_ and bop2ndorder_step_,
for any split into slices and any number of threads; a NaN remains a NaN, of whatever payload, and its weight becomes +1.
"""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bitfleet.c_library import CLibraryError, load_c_library
from bitfleet.optim.bop2ndorder import EPS, Correction, bias_corrections

__all__ = ["bop2ndorder_bits_", "bop_bits_", "kernel_library", "pack_flags"]

SOURCE = Path(__file__).with_suffix(".c")
RULES = ("bop", "bop2ndorder", "bop2ndorder_corrected")  # `enum rule` of the source
CHUNK = 262_144
MIN_SHARE = 32_768  # weights for which a thread is worth waking, as in torch

# Byte i of a word (0 or 1) times bit 56 - 7 i of this constant lands on bit 56 + i; no two products share a bit, so
# nothing carries.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))


def bop2ndorder_bits_(
    bits: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    gamma: float,
    sigma: float,
    threshold: float,
    correction: Correction,
    step: int,
) -> None:
    """`bop2ndorder_step_` on packed weights, in place.

    Args:
        bits: uint8 [n / 8], the signs of n weights.
        grad: fp32 or bf16 [n], gradient with respect to the +-1 weights.
        exp_avg: fp32 [n], first moment.
        exp_avg_sq: fp32 [n], second moment.
        gamma: rate of the first moment, in (0, 1].
        sigma: rate of the second moment, in (0, 1].
        threshold: flip above it, not negative.
        correction: "none", "as_coded" or "adam", see bop2ndorder.py.
        step: 1-based number of this update; only "adam" uses it.
    """
    divisors = None if correction == "none" else bias_corrections(correction, gamma, sigma, step)
    _update_(_Slice(bits, grad, exp_avg, exp_avg_sq), _Rates(gamma, sigma, threshold, divisors))


def bop_bits_(bits: Tensor, grad: Tensor, exp_avg: Tensor, *, gamma: float, threshold: float) -> None:
    """`bop_step_` on packed weights, in place.

    Args:
        bits: uint8 [n / 8], the signs of n weights.
        grad: fp32 or bf16 [n], gradient with respect to the +-1 weights.
        exp_avg: fp32 [n], moment.
        gamma: rate of the moment, in (0, 1].
        threshold: flip above it, not negative.
    """
    _update_(_Slice(bits, grad, exp_avg), _Rates(gamma, 1.0, threshold))


class _Slice(NamedTuple):
    """What an update reads and writes; Bop has no second moment."""

    bits: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None = None


class _Rates(NamedTuple):
    """Hyperparameters of one step: numbers, or 0-dim fp32 tensors for a compiled graph. No divisors: moments as they are."""

    gamma: float | Tensor
    sigma: float | Tensor
    threshold: float | Tensor
    divisors: tuple[float | Tensor, float | Tensor] | None = None


def _check(part: _Slice) -> None:
    """The kernel trusts its pointers: a wrong length or type would write past the end."""
    numel = part.grad.numel()
    if numel % 8:
        raise ValueError(f"grad has {numel} elements, expected a multiple of 8: eight weights share a byte")
    dtypes = ((torch.uint8,), (torch.float32, torch.bfloat16), (torch.float32,), (torch.float32,))
    for name, tensor, allowed in zip(part._fields, part, dtypes, strict=True):
        if tensor is None:
            continue
        length = numel // 8 if name == "bits" else numel
        if tensor.shape != (length,) or tensor.dtype not in allowed or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, of shape [{length}] and type {' or '.join(map(str, allowed))}, "
                f"not {list(tensor.shape)} with strides {list(tensor.stride())} of {tensor.dtype}"
            )
        if tensor.device != part.bits.device:
            raise ValueError(f"{name} is on {tensor.device}, bits are on {part.bits.device}")


def _update_(part: _Slice, rates: _Rates) -> None:
    _check(part)
    if part.bits.device.type != "cpu":
        _update_compiled_(part, rates)
        return
    built = kernel_library()
    if built is None:
        _update_chunked_(part, rates)
        return
    rule = "bop" if part.exp_avg_sq is None else "bop2ndorder" if rates.divisors is None else "bop2ndorder_corrected"
    built.update_bits(
        RULES.index(rule),
        part.grad.numel(),
        num_threads(part.grad.numel()),
        part.bits.data_ptr(),
        part.grad.data_ptr(),
        part.grad.dtype == torch.bfloat16,
        part.exp_avg.data_ptr(),
        None if part.exp_avg_sq is None else part.exp_avg_sq.data_ptr(),
        rates.gamma,
        rates.sigma,
        rates.threshold,
        *(rates.divisors or (1.0, 1.0)),
    )


def num_threads(numel: int) -> int:
    """Threads for a kernel over `numel` weights, as torch would choose. No result depends on it."""
    return max(1, min(torch.get_num_threads(), numel // MIN_SHARE))


def pack_flags(flags: Tensor) -> Tensor:
    """Pack a new bool tensor [n], n a multiple of 8, to uint8 [n / 8], least significant bit first."""
    if torch.compiler.is_compiling():  # a sum fuses with what makes the flags
        place = 1 << torch.arange(8, dtype=torch.int32, device=flags.device)
        return (flags.view(-1, 8) * place).sum(1).to(torch.uint8)
    # The top byte of a little-endian word is its last byte: one strided copy, a third of the time of a sum.
    return (flags.view(torch.int64) * _GATHER).view(torch.uint8)[7::8].contiguous()


@torch.no_grad()
def _update_torch_(part: _Slice, rates: _Rates) -> None:
    bits, grad, exp_avg, exp_avg_sq = part.bits, part.grad.float(), part.exp_avg, part.exp_avg_sq
    exp_avg.add_((grad - exp_avg) * rates.gamma)
    ratio = exp_avg
    if exp_avg_sq is not None:
        exp_avg_sq.add_((grad * grad - exp_avg_sq) * rates.sigma)
        if rates.divisors is None:
            ratio = exp_avg / (exp_avg_sq.sqrt() + EPS)
        else:
            ratio = (exp_avg / rates.divisors[0]) / ((exp_avg_sq / rates.divisors[1]).sqrt() + EPS)
    # A -1 stays only where -ratio < threshold holds: an exact tie and a NaN become +1. Never both, as threshold >= 0.
    positive, stays = pack_flags(ratio > rates.threshold), pack_flags(-ratio < rates.threshold)
    bits.copy_((bits & ~positive) | ~stays)


def _update_chunked_(part: _Slice, rates: _Rates) -> None:
    """In eager torch, in chunks whose temporaries stay in the cache."""
    for i in range(0, part.grad.numel(), CHUNK):
        first, last = i, i + CHUNK
        second = None if part.exp_avg_sq is None else part.exp_avg_sq[first:last]
        chunk = _Slice(part.bits[first // 8 : last // 8], part.grad[first:last], part.exp_avg[first:last], second)
        _update_torch_(chunk, rates)


@cache
def _compiled() -> Callable[[_Slice, _Rates], None]:
    # No fused multiply-add and a correctly rounded division on CUDA: the low bits of the eager rule.
    options = {"emulate_precision_casts": True, "eager_numerics.division_rounding": True}
    return torch.compile(_update_torch_, fullgraph=True, dynamic=True, options=dict(options))


_cannot_compile = False


def _update_compiled_(part: _Slice, rates: _Rates) -> None:
    """Through torch.compile; in eager torch, after one warning, where compiling fails."""
    global _cannot_compile
    if _cannot_compile:
        _update_chunked_(part, rates)
        return

    def tensor(value: float | Tensor) -> Tensor:  # a number would be a constant of the graph; `full` copies nothing
        return torch.full((), float(value), dtype=torch.float32, device=part.bits.device)

    divisors = None if rates.divisors is None else (tensor(rates.divisors[0]), tensor(rates.divisors[1]))
    try:
        _compiled()(part, _Rates(tensor(rates.gamma), tensor(rates.sigma), tensor(rates.threshold), divisors))
    except torch._dynamo.exc.TorchDynamoException as error:  # raised before anything is written
        _cannot_compile = True
        _warn_of_eager(" ".join(str(error).splitlines()[:2]))
        _update_chunked_(part, rates)


def _warn_of_eager(problem: str) -> None:
    warnings.warn(f"the flip rule runs in eager torch, many times slower: {problem}", RuntimeWarning, 2)


@cache
def kernel_library() -> ctypes.CDLL | None:
    """The functions of kernels.c, built on the first call in this process; None, after one warning, where that fails."""
    try:
        return _declare(load_c_library(SOURCE))
    except CLibraryError as error:
        _warn_of_eager(str(error))
        return None


def _declare(built: ctypes.CDLL) -> ctypes.CDLL:
    size, number, real, pointer = ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    built.update_bits.argtypes = [number, size, number, pointer, pointer, number, pointer, pointer, *5 * [real]]
    built.pack.argtypes = [size, number, pointer, number, pointer]
    built.unpack.argtypes = [size, number, pointer, number, pointer]
    for function in (built.update_bits, built.pack, built.unpack):
        function.restype = None
    return built
