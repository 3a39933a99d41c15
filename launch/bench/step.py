"""What an optimizer step costs: the flip rule on bits, compiled and eager, against AdamW and the memory, interleaved.

On a CPU DeepSpeedCPUAdam is among them where it builds. On a GPU all buffers are there.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.launch.bench.clock import seconds_per_call
from bitfleet.optim import bop2ndorder_step_
from bitfleet.optim.kernels import kernels
from bitfleet.optim.kernels.bits import pack_signs, unpack_signs
from bitfleet.optim.kernels.kernels import bop2ndorder_bits_, kernel_library
from bitfleet.trainer.engine.engine import deepspeed_cpu_adam

SIZES = (12_000_000, 62_000_000)
"""Weights of a Bi-Real Net 18 and of an XNOR-Net."""
RATES: dict[str, Any] = {"gamma": 1e-7, "sigma": 1e-3, "threshold": 1e-6}

CPU = torch.device("cpu")

REFERENCE = "AdamW fused"
ON_BITS = "kernel on bits, fp32 gradients"
COPY = "copy_"
LIMIT = "read-modify-write, 4 reads + 3 writes"


class Row(NamedTuple):
    """One contender at one size; times and ratios are medians over the rounds."""

    numel: int
    name: str
    ns_per_weight: float
    bytes_per_weight: float
    ratio: float
    """Time over that of fused AdamW in the same round."""
    limit_fraction: float
    """Bytes a second over those of the read-modify-write in the same round."""
    copy_fraction: float
    """Bytes a second over those of a copy in the same round."""


class FirstStep(NamedTuple):
    """Seconds of the first call in a new process, after the imports."""

    name: str
    cold_seconds: float
    """With empty cache folders: what is built is built."""
    warm_seconds: float
    """Again, in another process."""


class Contender(NamedTuple):
    """Something to measure, with the bytes that it has to move for each weight."""

    bytes_per_weight: float
    run: Callable[[], object]


def bench_step(
    sizes: Sequence[int] = SIZES,
    num_rounds: int = 7,
    device: torch.device = CPU,
    *,
    weights_per_turn: int = 50_000_000,
    with_deepspeed: bool = True,
) -> list[Row]:
    """Measure every contender on `device` in turns, `num_rounds` times after a round that does not count.

    All work on the same gradients and moments, so none finds more of its data in a cache than another.

    Args:
        sizes: numbers of weights.
        num_rounds: turns of each contender that count.
        device: where the weights are.
        weights_per_turn: calls of a turn, times the weights of a call, are about as many.
        with_deepspeed: whether DeepSpeedCPUAdam is a contender on a CPU; the first time it compiles for half a minute.

    Raises:
        ValueError: there is no C compiler, which a CPU needs, or a size is no positive multiple of 64.
    """
    if device.type == "cpu" and kernel_library() is None:
        raise ValueError("the benchmark of the step needs a C and a C++ compiler (gcc and g++) on the PATH")
    for size in sizes:
        if size <= 0 or size % 64:
            raise ValueError(f"sizes must be positive multiples of 64, not {size}")
    if num_rounds < 1:
        raise ValueError(f"the number of rounds must be positive, not {num_rounds}")
    rows = []
    for size in sizes:
        num_calls = max(2 if device.type == "cpu" else 5, weights_per_turn // size)
        rows += _bench_size(
            size, contenders(size, device, with_deepspeed=with_deepspeed), num_rounds, num_calls, device
        )
    return rows


def _bench_size(
    numel: int, entries: dict[str, Contender], num_rounds: int, num_calls: int, device: torch.device
) -> list[Row]:
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for count in range(num_rounds + 1):
        for name, contender in entries.items():
            contender.run()
            taken = seconds_per_call(contender.run, num_calls, device)
            if count > 0:
                seconds[name].append(taken)

    def fraction(name: str, limit: str) -> float:
        """Bytes a second of `name` over those of `limit`."""
        ratio = entries[name].bytes_per_weight / entries[limit].bytes_per_weight
        return ratio * statistics.median(b / a for a, b in zip(seconds[name], seconds[limit], strict=True))

    def row(name: str) -> Row:
        return Row(
            numel,
            name,
            statistics.median(seconds[name]) / numel * 1e9,
            entries[name].bytes_per_weight,
            statistics.median(a / b for a, b in zip(seconds[name], seconds[REFERENCE], strict=True)),
            fraction(name, LIMIT),
            fraction(name, COPY),
        )

    return [row(name) for name in entries]


def contenders(numel: int, device: torch.device = CPU, *, with_deepspeed: bool = True) -> dict[str, Contender]:
    """The lines of the table, over shared buffers of `numel` weights on `device`."""
    generator = torch.Generator(device).manual_seed(0)
    grad = torch.randn(numel, generator=generator, device=device) * 1e-3
    exp_avg, exp_avg_sq = grad.clone(), grad.square()
    weight = torch.where(torch.randn(numel, generator=generator, device=device) < 0, -1.0, 1.0)
    bits = pack_signs(weight)
    grad_bf16, scratch, scratch_bf16 = grad.bfloat16(), torch.empty_like(grad), torch.empty_like(grad).bfloat16()
    compiled, rates = _compiled_rule(device)
    touch_ = torch.compile(_read_modify_write_, fullgraph=True, dynamic=True)
    zero = torch.zeros((), device=device)

    def on_bits(g: Tensor, correction: Literal["none", "adam"] = "none") -> Callable[[], object]:
        return lambda: bop2ndorder_bits_(bits, g, exp_avg, exp_avg_sq, **RATES, correction=correction, step=9)

    def adamw(kind: Literal["fused", "foreach"]) -> Callable[[], object]:
        parameter = nn.Parameter(weight)
        parameter.grad = grad
        # At a rate of 0 the weights stay +-1, for the same time.
        optimizer = torch.optim.AdamW([parameter], lr=0.0, **{kind: True})  # type: ignore[arg-type]
        step = torch.tensor(1.0, device=device if kind == "fused" else CPU)
        optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer.step

    parameter = nn.Parameter(weight)
    parameter.grad = grad
    deepspeed = deepspeed_cpu_adam(parameter) if with_deepspeed and device.type == "cpu" else None
    return {
        REFERENCE: Contender(28, adamw("fused")),
        "AdamW foreach": Contender(28, adamw("foreach")),
        **({"DeepSpeedCPUAdam": Contender(28, deepspeed.step)} if deepspeed else {}),
        ON_BITS: Contender(20.25, on_bits(grad)),
        "kernel on bits, bf16 gradients": Contender(18.25, on_bits(grad_bf16)),
        "kernel on bits, fp32, correction adam": Contender(20.25, on_bits(grad, "adam")),
        "eager torch on bits, the fallback": Contender(20.25, lambda: _fallback_(bits, grad, exp_avg, exp_avg_sq)),
        "compiled rule on fp32 weights": Contender(28, lambda: compiled(weight, grad, exp_avg, exp_avg_sq, **rates)),
        "eager rule on fp32 weights": Contender(
            28, lambda: bop2ndorder_step_(weight, grad, exp_avg, exp_avg_sq, **RATES)
        ),
        "pack fp32": Contender(4.125, lambda: pack_signs(weight, bits)),
        "unpack to fp32": Contender(4.125, lambda: unpack_signs(bits, scratch)),
        "unpack to bf16": Contender(2.125, lambda: unpack_signs(bits, scratch_bf16)),
        COPY: Contender(8, lambda: scratch.copy_(grad)),
        LIMIT: Contender(28, lambda: touch_(weight, exp_avg, exp_avg_sq, grad, zero)),
    }


def _fallback_(bits: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Run what `bop2ndorder_bits_` does where nothing can be compiled."""
    kernels._update_chunked_(kernels.Slice(bits, grad, exp_avg, exp_avg_sq), kernels.Rates(**RATES), None)


def _compiled_rule(device: torch.device = CPU) -> tuple[Callable[..., None], dict[str, Tensor]]:
    """The rule in one graph, and its rates as tensors, so that none becomes a constant of the graph."""
    compiled = torch.compile(bop2ndorder_step_, fullgraph=True, dynamic=True)
    return compiled, {key: torch.tensor(value, device=device) for key, value in RATES.items()}


def _read_modify_write_(a: Tensor, b: Tensor, c: Tensor, d: Tensor, zero: Tensor) -> None:
    """The traffic of a rule on fp32 weights without its arithmetic; with `zero` = 0 no value changes."""
    change = d * zero
    a.add_(change)
    b.add_(change)
    c.add_(change)


def first_steps() -> list[FirstStep]:
    """How long the first step of a process takes, with the kernel and with the compiled rule."""
    return [
        FirstStep(name, *_cold_and_warm(kind))
        for name, kind in (("kernel on bits", "bits"), ("compiled rule", "compiled"))
    ]


def _cold_and_warm(kind: str) -> tuple[float, float]:
    code = f"from bitfleet.launch.bench.step import first_step; print(first_step({kind!r}))"
    with tempfile.TemporaryDirectory() as folder:
        caches = {"BITFLEET_CACHE": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        env = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(sys.path)}

        def run() -> float:
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
            return float(done.stdout.split()[-1])

        return run(), run()


def first_step(kind: Literal["bits", "compiled"], numel: int = 1 << 20) -> float:
    """Seconds of one step on `numel` weights; in a new process, of the first one."""
    weight, grad, exp_avg, exp_avg_sq = torch.ones(numel), torch.ones(numel), torch.zeros(numel), torch.zeros(numel)
    start = time.perf_counter()
    if kind == "bits":
        bits = pack_signs(weight)
        bop2ndorder_bits_(bits, grad, exp_avg, exp_avg_sq, **RATES, correction="none", step=1)
        unpack_signs(bits, weight)
    else:
        compiled, rates = _compiled_rule()
        compiled(weight, grad, exp_avg, exp_avg_sq, **rates)
    return time.perf_counter() - start


def format_steps(rows: Sequence[Row], firsts: Sequence[FirstStep] = ()) -> str:
    """The rows as a table for a terminal, a block for every size, then the first steps."""
    lines: list[str] = []
    for numel in dict.fromkeys(row.numel for row in rows):
        lines += [
            f"{numel:,} weights, {torch.get_num_threads()} threads",
            f"  {'':38}{'ns/weight':>10}{'bytes':>8}{'ratio to AdamW':>16}{'of the limit':>14}{'of a copy':>11}",
        ]
        lines += [
            f"  {row.name:38}{row.ns_per_weight:10.3f}{row.bytes_per_weight:8.2f}{row.ratio:16.3f}{row.limit_fraction:14.3f}"
            f"{row.copy_fraction:11.3f}"
            for row in rows
            if row.numel == numel
        ]
        by_name = {row.name: row.ns_per_weight for row in rows if row.numel == numel}
        lines.append(f"  {'pack fp32 + unpack to fp32':38}{by_name['pack fp32'] + by_name['unpack to fp32']:10.3f}")
    lines += [f"first step of the {name}: {cold:.2f} s cold, {warm:.2f} s warm" for name, cold, warm in firsts]
    return "\n".join(lines)
