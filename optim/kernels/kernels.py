"""Flip rules on packed signs: the update of a slice whose weights exist as bits only.

A bit-flipping step is bound by memory, and a +-1 weight needs no more than a bit of it: 20.25 bytes
a weight with fp32 gradients, 18.25 with bf16, against 28 of a rule on fp32 weights. Where the
arithmetic runs:

- CPU: kernels.c, compiled by the system's C compiler at first use (bitfleet/c_library.py).
- CPU without a compiler: the same in eager torch, chunk by chunk. One warning says so.
- GPU: triton_kernels.py, one launch for a slice. Rates and the flag "every gradient is finite" are
  read on the device.
- GPU on which Triton does not work (no C compiler, no Python headers): eager torch. One warning
  says so.

Bits are least significant first, bit 1 = +1. On the CPU every path gives the bits of bop_step_ and
bop2ndorder_step_, for any split into slices and any number of threads; a NaN stays a NaN (of any
payload), and its weight becomes +1.
"""

import ctypes
import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bitfleet.c_library import CLibraryError, load_c_library

SOURCE = Path(__file__).with_suffix(".c")
ENUM = ("bop", "bop2ndorder", "bop2ndorder_corrected")  # `enum rule` of the source
CHUNK, GPU_CHUNK = 262_144, 1 << 23
MIN_SHARE = 32_768
"""Weights that justify one more thread, as in torch. models/layers/binary_conv.py repeats this and
`num_threads`, because models and optimizers do not import each other: change both together."""

Correction = Literal["none", "as_coded", "adam"]
"""Bias correction of bop2ndorder's moments, see optim/rules/bop2ndorder.py."""
EPS = 1e-10
"""Added to the root of bop2ndorder's second moment."""
Number = float | Tensor
"""Hyperparameter of a step: a float, or fp32 [] on the device."""

# Byte i of a word (0 or 1) times bit 56 - 7 i of this constant lands on bit 56 + i; no two products
# share a bit, so nothing carries.
_GATHER = sum(1 << (56 - 7 * i) for i in range(8))


def check_correction(value: str) -> None:
    """Raise ValueError unless `value` is a bias correction."""
    if value not in get_args(Correction):
        raise ValueError(f"correction must be one of {', '.join(get_args(Correction))}, not {value!r}")


def bias_corrections(correction: Correction, gamma: float, sigma: float, step: int) -> tuple[float, float]:
    """Divisors of the first and the second moment at the 1-based `step`, in float64.

    Raises:
        ValueError: one would be 0; the ratio would be NaN, which turns a weight into +1. Or there
            is no such correction.
    """
    check_correction(correction)
    if correction == "none":
        return 1.0, 1.0
    if not (gamma > 0.0 and sigma > 0.0):
        raise ValueError(f"the correction {correction!r} divides by gamma and sigma, which are {gamma} and {sigma}")
    if correction == "as_coded":
        return gamma, sigma
    return _one_minus_power(gamma, step), _one_minus_power(sigma, step)


def _one_minus_power(rate: float, step: int) -> float:
    """1 - (1 - rate)^step; in float32 1 - rate alone would be 19 % off at a rate of 1e-7."""
    return 1.0 if rate == 1.0 else -math.expm1(step * math.log1p(-rate))


def root(values: Tensor) -> Tensor:
    """Return the square roots of `values`, those of fp32 correctly rounded, as in the kernels.

    torch's own are not on a CPU where it takes them from MKL: one in six is its neighbour.
    """
    return values.sqrt() if values.is_cuda else values.double().sqrt().to(values.dtype)


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
    """Apply `bop2ndorder_step_` to packed weights, in place.

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
    numbers = {"gamma": gamma, "sigma": sigma, "threshold": threshold}
    if correction != "none":
        numbers |= zip(("divisor", "divisor_sq"), bias_corrections(correction, gamma, sigma, step), strict=True)
    flip_packed_(bits, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, numbers)


class Slice(NamedTuple):
    """Tensors that an update reads and writes; Bop has no second moment."""

    bits: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None = None


class Rates(NamedTuple):
    """Hyperparameters of one step: numbers, or 0-dim fp32 tensors on the device. No divisors:
    moments as they are."""

    gamma: Number
    sigma: Number
    threshold: Number
    divisors: tuple[Number, Number] | None = None


def _check(part: Slice) -> None:
    """Check lengths and types: the kernel trusts its pointers and would write past the end."""
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


def flip_packed_(
    bits: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    numbers: Mapping[str, Number],
    finite: Tensor | None = None,
) -> None:
    """Update packed weights and their moments in place, as `bop2ndorder_step_`, or `bop_step_`
    without a second moment.

    Args:
        bits: uint8 [n / 8], the signs of n weights.
        grad: fp32 or bf16 [n], gradient with respect to the +-1 weights.
        state: "exp_avg" and for bop2ndorder "exp_avg_sq", fp32 [n].
        numbers: gamma, threshold, and for bop2ndorder sigma; "divisor" and "divisor_sq" where
            moments are corrected. On a GPU a tensor among them (fp32 []) costs no synchronisation.
        finite: bool [] on the device: False leaves everything as it is. None is True.

    Raises:
        ValueError: a tensor has the wrong length, type, strides or device.
    """
    part = Slice(bits, grad, state["exp_avg"], state.get("exp_avg_sq"))
    divisors = (numbers["divisor"], numbers["divisor_sq"]) if "divisor" in numbers else None
    rates = Rates(numbers["gamma"], numbers.get("sigma", 1.0), numbers["threshold"], divisors)
    _check(part)
    if part.bits.device.type != "cpu":
        _update_on_gpu_(part, rates, finite)
        return
    built = kernel_library()
    if built is None:
        _update_chunked_(part, rates, finite)
        return
    if finite is not None and not finite:
        return
    rule = "bop" if part.exp_avg_sq is None else "bop2ndorder" if rates.divisors is None else "bop2ndorder_corrected"
    built.update_bits(
        ENUM.index(rule),
        part.grad.numel(),
        num_threads(part.grad.numel()),
        part.bits.data_ptr(),
        part.grad.data_ptr(),
        part.grad.dtype == torch.bfloat16,
        part.exp_avg.data_ptr(),
        None if part.exp_avg_sq is None else part.exp_avg_sq.data_ptr(),
        *(float(number) for number in rates[:3]),
        *(float(number) for number in rates.divisors or (1.0, 1.0)),
    )


def num_threads(numel: int) -> int:
    """Threads for a kernel over `numel` weights, as torch would choose. No result depends on it."""
    return max(1, min(torch.get_num_threads(), numel // MIN_SHARE))


def pack_flags(flags: Tensor) -> Tensor:
    """Pack a new bool tensor [n], n a multiple of 8, to uint8 [n / 8], least significant bit
    first."""
    # The top byte of a little-endian word is its last byte: one strided copy, a third of the time
    # of a sum.
    return (flags.view(torch.int64) * _GATHER).view(torch.uint8)[7::8].contiguous()


@torch.no_grad()
def _update_torch_(part: Slice, rates: Rates, finite: Tensor | None) -> None:
    bits, grad, exp_avg, exp_avg_sq = part.bits, part.grad.float(), part.exp_avg, part.exp_avg_sq
    first = exp_avg + (grad - exp_avg) * rates.gamma
    ratio, second = first, None
    if exp_avg_sq is not None:
        second = exp_avg_sq + (grad * grad - exp_avg_sq) * rates.sigma
        if rates.divisors is None:
            ratio = first / (root(second) + EPS)
        else:
            ratio = (first / rates.divisors[0]) / (root(second / rates.divisors[1]) + EPS)
    # A -1 stays only where -ratio < threshold holds: an exact tie and a NaN become +1. Never both,
    # as threshold >= 0.
    positive, stays = pack_flags(ratio > rates.threshold), pack_flags(-ratio < rates.threshold)
    for old, new in ((exp_avg, first), (exp_avg_sq, second), (bits, (bits & ~positive) | ~stays)):
        if old is not None and new is not None:
            old.copy_(new if finite is None else torch.where(finite, new, old))


def _update_chunked_(part: Slice, rates: Rates, finite: Tensor | None) -> None:
    """Update in eager torch, in chunks: on a CPU their temporaries stay in the cache, on a GPU they
    are few."""
    size = CHUNK if part.bits.device.type == "cpu" else GPU_CHUNK
    for i in range(0, part.grad.numel(), size):
        first, last = i, i + size
        second = None if part.exp_avg_sq is None else part.exp_avg_sq[first:last]
        chunk = Slice(part.bits[first // 8 : last // 8], part.grad[first:last], part.exp_avg[first:last], second)
        _update_torch_(chunk, rates, finite)


def _update_on_gpu_(part: Slice, rates: Rates, finite: Tensor | None) -> None:
    if not on_gpu(lambda triton: triton.launch_update(*part, **_on_device(rates, finite, part.bits.device), eps=EPS)):
        _update_chunked_(part, rates, finite)


def _on_device(rates: Rates, finite: Tensor | None, device: torch.device) -> dict[str, Any]:
    def tensor(number: Number) -> Tensor:
        return number if isinstance(number, Tensor) else _scalar(float(number), device)

    return {
        "gamma": tensor(rates.gamma),
        "sigma": tensor(rates.sigma),
        "threshold": tensor(rates.threshold),
        "divisors": None if rates.divisors is None else (tensor(rates.divisors[0]), tensor(rates.divisors[1])),
        "finite": tensor(1.0) if finite is None else finite,
    }


@lru_cache(maxsize=64)
def _scalar(value: float, device: torch.device) -> Tensor:
    """Put a number on the device; `full` is a launch without a copy, and schedules repeat their
    values within a step."""
    return torch.full((), value, dtype=torch.float32, device=device)


class _Triton:
    """State of this process: a kernel of triton_kernels.py was launched, or failed."""

    works = fails = False


def on_gpu(launch: Callable[[Any], None]) -> bool:
    """Call `launch` with the module triton_kernels; False, after one warning, where Triton does not
    work on this machine.

    Raises:
        Exception: of a launch after one that worked: that is not a missing compiler.
    """
    if _Triton.fails:
        return False
    try:
        # Here: the import takes most of a second, and a CPU needs none of it.
        from bitfleet.optim.kernels import triton_kernels

        launch(triton_kernels)
    except (
        Exception
    ) as error:  # of the import, of Triton's compiler, of gcc, of the driver: all before anything is written
        if _Triton.works:
            raise
        _Triton.fails = True
        _warn_of_eager(" ".join(str(error).splitlines()[:2]))
        return False
    _Triton.works = True
    return True


def _warn_of_eager(problem: str) -> None:
    warnings.warn(f"the flip rule runs in eager torch, many times slower: {problem}", RuntimeWarning, 2)


@cache
def kernel_library() -> ctypes.CDLL | None:
    """Return the functions of kernels.c, built on the first call in this process; None, after one
    warning, if that fails."""
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
    built.unpack_changed.argtypes = [size, number, pointer, pointer, number, pointer]
    for function in (built.update_bits, built.pack, built.unpack, built.unpack_changed):
        function.restype = None
    return built
