"""Time an update of the weights: the rule on bits, compiled and eager, against AdamW and a copy."""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitfleet.launch.bench.command import Step
from bitfleet.launch.bench.results import Row, titled
from bitfleet.launch.bench.timing import interleave, ratio, seconds_per_call
from bitfleet.optim import bop2ndorder_step_
from bitfleet.optim.kernels.bits import pack_signs
from bitfleet.optim.kernels.kernels import bop2ndorder_bits_, kernel_library

SIZES = (12_000_000, 62_000_000)
"""Weights of a Bi-Real Net 18 and of an XNOR-Net."""
RATES: dict[str, Any] = {"gamma": 1e-7, "sigma": 1e-3, "threshold": 1e-6}
CPU = torch.device("cpu")
REFERENCE, ON_BITS, COPY = "AdamW fused", "kernel on bits, fp32 gradients", "copy_"


def bench_step(options: Step) -> Iterator[str]:
    """Yield a table per size."""
    for size in SIZES:
        rows = measure_step(size, options.rounds)
        yield titled(f"{size:,} weights, {torch.get_num_threads()} threads, median of {options.rounds} rounds", rows)


def measure_step(
    numel: int, num_rounds: int, device: torch.device = CPU, *, weights_per_turn: int = 50_000_000
) -> list[Row]:
    """Time every contender in turns; all work on the same gradients and moments.

    A turn is about `weights_per_turn` / `numel` calls.

    Raises:
        ValueError: a CPU without a C compiler.
    """
    if device.type == "cpu" and kernel_library() is None:
        raise ValueError("the benchmark of the step needs a C and a C++ compiler (gcc and g++) on the PATH")
    num_calls = max(2 if device.type == "cpu" else 20, weights_per_turn // numel)
    entries = contenders(numel, device)
    runs = {name: run for name, (_, run) in entries.items()}

    def turn(run: Callable[[], object]) -> float:
        run()
        return seconds_per_call(run, num_calls, device)

    seconds = interleave({name: functools.partial(turn, run) for name, run in runs.items()}, num_rounds)
    copied_bytes, _ = entries[COPY]
    return [
        {
            "what": name,
            "ns_per_weight": statistics.median(seconds[name]) / numel * 1e9,
            "time_to_adamw": ratio(seconds[name], seconds[REFERENCE]),
            "of_copy_bandwidth": ratio(seconds[COPY], seconds[name]) * num_bytes / copied_bytes,
        }
        for name, (num_bytes, _) in entries.items()
    ]


def contenders(numel: int, device: torch.device = CPU) -> dict[str, tuple[float, Callable[[], object]]]:
    """Return the bytes that each contender has to move per weight, and the contender itself.

    They share buffers of `numel` weights on `device`.
    """
    generator = torch.Generator(device).manual_seed(0)
    grad = torch.randn(numel, generator=generator, device=device) * 1e-3
    exp_avg, exp_avg_sq = grad.clone(), grad.square()
    weight = torch.where(torch.randn(numel, generator=generator, device=device) < 0, -1.0, 1.0)
    bits = pack_signs(weight)
    scratch = torch.empty_like(grad)
    rates = {key: torch.tensor(value, device=device) for key, value in RATES.items()}
    parameter = nn.Parameter(weight)
    parameter.grad = grad

    def on_bits(g: Tensor) -> Callable[[], object]:
        return lambda: bop2ndorder_bits_(bits, g, exp_avg, exp_avg_sq, **RATES, correction="none", step=9)

    def on_weights(rule: Callable[..., object], rates: dict[str, Any]) -> Callable[[], object]:
        return lambda: rule(weight, grad, exp_avg, exp_avg_sq, **rates)

    def adamw(kind: Literal["fused", "foreach"]) -> Callable[[], object]:
        # At a rate of 0 the weights stay +-1, for the same time.
        optimizer = torch.optim.AdamW([parameter], lr=0.0, **{kind: True})  # type: ignore[arg-type]
        step = torch.tensor(1.0, device=device if kind == "fused" else CPU)
        optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer.step

    return {
        REFERENCE: (28, adamw("fused")),
        "AdamW foreach": (28, adamw("foreach")),
        ON_BITS: (20.25, on_bits(grad)),
        "kernel on bits, bf16 gradients": (18.25, on_bits(grad.bfloat16())),
        "compiled rule on fp32 weights": (28, on_weights(compiled_rule(), rates)),
        "eager rule on fp32 weights": (28, on_weights(bop2ndorder_step_, RATES)),
        COPY: (8, lambda: scratch.copy_(grad)),
    }


@functools.cache
def compiled_rule() -> Callable[..., None]:
    """Return the rule in one graph; its rates must be tensors, so that none becomes a constant."""
    compiled: Callable[..., None] = torch.compile(bop2ndorder_step_, fullgraph=True, dynamic=True)
    return compiled
