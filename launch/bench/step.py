"""Time an optimizer step: the rule on bits, compiled and eager, against AdamW and the memory."""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.launch.bench.command import Step
from bitfleet.launch.bench.timing import interleave, ratio, seconds_per_call, titled
from bitfleet.optim import bop2ndorder_step_
from bitfleet.optim.kernels import kernels
from bitfleet.optim.kernels.bits import pack_signs, unpack_signs
from bitfleet.optim.kernels.kernels import bop2ndorder_bits_, kernel_library

SIZES = (12_000_000, 62_000_000)
"""Weights of a Bi-Real Net 18 and of an XNOR-Net."""
RATES: dict[str, Any] = {"gamma": 1e-7, "sigma": 1e-3, "threshold": 1e-6}
CPU = torch.device("cpu")
REFERENCE = "AdamW fused"
ON_BITS = "kernel on bits, fp32 gradients"
COPY = "copy_"
LIMIT = "read-modify-write, 4 reads + 3 writes"


class Contender(NamedTuple):
    """An operation to time, with the bytes that it has to move per weight."""

    bytes_per_weight: float
    run: Callable[[], object]


class Row(NamedTuple):
    """One contender at one size; medians over the rounds."""

    numel: int
    name: str
    ns_per_weight: float
    bytes_per_weight: float
    time_to_adamw: float
    """Time over that of fused AdamW."""
    of_limit: float
    """Bytes per second over those of the read-modify-write."""
    of_copy_bandwidth: float
    """Bytes per second over those of a copy."""


def bench_step(options: Step) -> Iterator[str]:
    """Yield a table per size, then the time of the first step of a process."""
    for size in SIZES:
        rows = measure_step(size, options.rounds)
        heads = ["", "ns/weight", "bytes", "ratio to AdamW", "of the limit", "of a copy"]
        cells = [[row.name, *(f"{value:.3f}" for value in row[2:])] for row in rows]
        pack, unpack = (row.ns_per_weight for row in rows if row.name in ("pack fp32", "unpack to fp32"))
        both = ["pack fp32 + unpack to fp32", f"{pack + unpack:.3f}"]
        yield titled(f"{size:,} weights, {torch.get_num_threads()} threads", [heads, *cells, both])
    for kind, name in (("bits", "kernel on bits"), ("compiled", "compiled rule")):
        cold, warm = first_steps(kind)
        yield f"first step of the {name}: {cold:.2f} s cold, {warm:.2f} s warm"


def measure_step(
    numel: int, num_rounds: int, device: torch.device = CPU, *, weights_per_turn: int = 50_000_000
) -> list[Row]:
    """Time every contender on `device` in turns; all work on the same gradients and moments.

    Args:
        numel: number of weights, a multiple of 64.
        num_rounds: turns of each contender.
        device: where the weights are.
        weights_per_turn: about the calls per turn times the weights per call; 0 in a dry run.

    Raises:
        ValueError: a CPU without a C compiler.
    """
    if device.type == "cpu" and kernel_library() is None:
        raise ValueError("the benchmark of the step needs a C and a C++ compiler (gcc and g++) on the PATH")
    num_calls = max(2 if device.type == "cpu" else 5, weights_per_turn // numel)
    # DeepSpeedCPUAdam compiles for half a minute.
    entries = contenders(numel, device, with_deepspeed=device.type == "cpu" and weights_per_turn > 0)

    def turn(run: Callable[[], object]) -> float:
        run()
        return seconds_per_call(run, num_calls, device)

    seconds = interleave({name: functools.partial(turn, entry.run) for name, entry in entries.items()}, num_rounds)

    def fraction(name: str, limit: str) -> float:
        """Bytes per second of `name` over those of `limit`."""
        size_ratio = entries[name].bytes_per_weight / entries[limit].bytes_per_weight
        return size_ratio * ratio(seconds[limit], seconds[name])

    return [
        Row(
            numel,
            name,
            statistics.median(seconds[name]) / numel * 1e9,
            entry.bytes_per_weight,
            ratio(seconds[name], seconds[REFERENCE]),
            fraction(name, LIMIT),
            fraction(name, COPY),
        )
        for name, entry in entries.items()
    ]


def contenders(numel: int, device: torch.device = CPU, *, with_deepspeed: bool = False) -> dict[str, Contender]:
    """Return the lines of the table, over shared buffers of `numel` weights on `device`."""
    generator = torch.Generator(device).manual_seed(0)
    grad = torch.randn(numel, generator=generator, device=device) * 1e-3
    exp_avg, exp_avg_sq = grad.clone(), grad.square()
    weight = torch.where(torch.randn(numel, generator=generator, device=device) < 0, -1.0, 1.0)
    bits = pack_signs(weight)
    grad_bf16, scratch = grad.bfloat16(), torch.empty_like(grad)
    compiled, rates = compiled_rule(), _rate_tensors(device)
    touch_ = torch.compile(_read_modify_write_, fullgraph=True, dynamic=True)
    zero = torch.zeros((), device=device)
    parameter = nn.Parameter(weight)
    parameter.grad = grad

    def on_bits(g: Tensor) -> Callable[[], object]:
        return lambda: bop2ndorder_bits_(bits, g, exp_avg, exp_avg_sq, **RATES, correction="none", step=9)

    def adamw(kind: Literal["fused", "foreach"]) -> Callable[[], object]:
        # At a rate of 0 the weights stay +-1, for the same time.
        optimizer = torch.optim.AdamW([parameter], lr=0.0, **{kind: True})  # type: ignore[arg-type]
        step = torch.tensor(1.0, device=device if kind == "fused" else CPU)
        optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer.step

    deepspeed = deepspeed_cpu_adam(parameter) if with_deepspeed else None
    eager = kernels.Slice(bits, grad, exp_avg, exp_avg_sq), kernels.Rates(**RATES)
    return {
        REFERENCE: Contender(28, adamw("fused")),
        "AdamW foreach": Contender(28, adamw("foreach")),
        **({"DeepSpeedCPUAdam": Contender(28, deepspeed.step)} if deepspeed else {}),
        ON_BITS: Contender(20.25, on_bits(grad)),
        "kernel on bits, bf16 gradients": Contender(18.25, on_bits(grad_bf16)),
        "eager torch on bits, the fallback": Contender(20.25, lambda: kernels._update_chunked_(*eager, None)),
        "compiled rule on fp32 weights": Contender(28, lambda: compiled(weight, grad, exp_avg, exp_avg_sq, **rates)),
        "eager rule on fp32 weights": Contender(
            28, lambda: bop2ndorder_step_(weight, grad, exp_avg, exp_avg_sq, **RATES)
        ),
        "pack fp32": Contender(4.125, lambda: pack_signs(weight, bits)),
        "unpack to fp32": Contender(4.125, lambda: unpack_signs(bits, scratch)),
        COPY: Contender(8, lambda: scratch.copy_(grad)),
        LIMIT: Contender(28, lambda: touch_(weight, exp_avg, exp_avg_sq, grad, zero)),
    }


def deepspeed_cpu_adam(parameter: nn.Parameter) -> torch.optim.Optimizer | None:
    """Create DeepSpeed's AdamW for the CPU at a rate of 0; None if its C++ does not build.

    The first call on a machine compiles for about half a minute.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam([parameter], lr=0.0, adamw_mode=True)
    except (ImportError, OSError, RuntimeError):
        return None
    return optimizer


@functools.cache
def compiled_rule() -> Callable[..., None]:
    """Return the rule in one graph; its rates must be tensors, so that none becomes a constant."""
    compiled: Callable[..., None] = torch.compile(bop2ndorder_step_, fullgraph=True, dynamic=True)
    return compiled


def _rate_tensors(device: torch.device) -> dict[str, Tensor]:
    return {key: torch.tensor(value, device=device) for key, value in RATES.items()}


def _read_modify_write_(a: Tensor, b: Tensor, c: Tensor, d: Tensor, zero: Tensor) -> None:
    """Move the bytes of a rule on fp32 weights without its arithmetic; `zero` is 0."""
    change = d * zero
    a.add_(change)
    b.add_(change)
    c.add_(change)


def first_steps(kind: str) -> list[float]:
    """Time the first step in two new processes: with empty caches, and again."""
    code = f"from bitfleet.launch.bench.step import first_step; print(first_step({kind!r}))"
    with tempfile.TemporaryDirectory() as folder:
        caches = {"BITFLEET_CACHE": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        return [float(in_new_process(code, **caches).split()[-1]) for _ in range(2)]


def in_new_process(code: str, **environment: str) -> str:
    """Run Python code in a new process that finds the same modules, and return what it printed."""
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True).stdout


def first_step(kind: str, numel: int = 1 << 20) -> float:
    """Time one step on `numel` weights, with the kernel ("bits") or the compiled rule."""
    weight, grad, exp_avg, exp_avg_sq = torch.ones(numel), torch.ones(numel), torch.zeros(numel), torch.zeros(numel)
    start = time.perf_counter()
    if kind == "bits":
        bits = pack_signs(weight)
        bop2ndorder_bits_(bits, grad, exp_avg, exp_avg_sq, **RATES, correction="none", step=1)
        unpack_signs(bits, weight)
    else:
        compiled_rule()(weight, grad, exp_avg, exp_avg_sq, **_rate_tensors(CPU))
    return time.perf_counter() - start
