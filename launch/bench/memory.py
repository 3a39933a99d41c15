"""What a rank holds: bytes of tensors after a step and at the peak within it, for the contenders of `bench comm`."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bitfleet.launch.bench.comm import DEPTH, GRAD_DTYPES, METHODS, TITLES, WIDTH, Contender, GradDtype, Method
from bitfleet.launch.preflight.tensor_bytes import TensorBytes
from bitfleet.trainer.ranks.collectives import Ranks, barrier, gather_from_ranks

NUM_BUCKETS = 8
BUCKET_BYTES = 4 / NUM_BUCKETS
"""Of one bucket of fp32 gradients, in bytes per parameter of the network."""
SETTLE_SECONDS = 0.05
"""After a step gloo's threads still hold the tensors of the last collectives; they need the interpreter to let go of them."""


class Row(NamedTuple):
    """One contender; bytes per parameter on the rank that has most."""

    method: Method
    grad_dtype: GradDtype
    after_step: float
    peak_backward: float
    """Within forward and backward, activations included."""
    peak_step: float
    """Within the optimizer step."""


def bench_memory(ranks: Ranks, device: torch.device, *, num_steps: int = 5) -> list[Row]:
    """Measure every contender over `num_steps` steps, after two that do not count; every rank calls this."""
    return [_measure(method, grad_dtype, ranks, device, num_steps) for grad_dtype in GRAD_DTYPES for method in METHODS]


def _measure(method: Method, grad_dtype: GradDtype, ranks: Ranks, device: torch.device, num_steps: int) -> Row:
    samples = []
    with TensorBytes() as count:
        contender = Contender(method, grad_dtype, ranks, device, bucket_numel=DEPTH // NUM_BUCKETS * WIDTH**2)
        for _ in range(2 + num_steps):  # the first one allocates the state
            count.take_peak()
            contender.backward()
            peak_backward = count.take_peak()
            contender.update()
            peak_step = count.take_peak()
            barrier()
            time.sleep(SETTLE_SECONDS)
            samples.append((count.live, peak_backward, peak_step))
    held, *peaks = torch.tensor(samples[2:], dtype=torch.float64, device=device).T
    # What is held between steps is there after every one of them; more than the least of them is on its way out.
    mine = torch.stack([held.amin(), *(peak.amax() for peak in peaks)]) / contender.numel
    contender.close()
    worst = torch.stack(gather_from_ranks(mine)).amax(0)
    return Row(method, grad_dtype, *worst.tolist())


def format_memory(rows: Sequence[Row], ranks: Ranks) -> str:
    """The rows as a table for a terminal."""
    lines = [
        f"bytes of tensors per parameter on a rank, {ranks.world_size} ranks; a bucket of fp32 gradients is {BUCKET_BYTES:g}",
        f"  {'':30}{'gradients':10}{'after the step':>16}{'peak in backward':>18}{'peak in step':>14}",
    ]
    lines += [
        f"  {TITLES[row.method]:30}{row.grad_dtype:10}{row.after_step:16.3f}{row.peak_backward:18.3f}{row.peak_step:14.3f}"
        for row in rows
    ]
    return "\n".join(lines)
