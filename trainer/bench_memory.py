"""What a rank holds: bytes of tensors after a step and at the peak within it, for the contenders of `bench comm`."""

import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitfleet.trainer.bench_comm import DEPTH, GRAD_DTYPES, METHODS, TITLES, WIDTH, Contender, GradDtype, Method
from bitfleet.trainer.distributed import Ranks, barrier, gather_from_ranks

NUM_BUCKETS = 8
BUCKET_BYTES = 4 / NUM_BUCKETS
"""Of one bucket of fp32 gradients, in bytes per parameter of the network."""
SETTLE_SECONDS = 0.05
"""After a step gloo's threads still hold the tensors of the last collectives; they need the interpreter to let go of them."""


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators have seen since it was entered and that are still alive.

    Every storage counts once, however many tensors are views of it, from the operator that makes it (or first takes it) until
    its memory is given back, whichever thread does that. Scratch memory within an operator and gloo's own buffers are no
    tensors and do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator `func` and look at the tensors that go in and come out."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def take_peak(self) -> int:
        """The most bytes alive at any time since the last call."""
        peak, self.peak = self.peak, self.live
        return peak

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # the address of the storage itself; its Python object lives as long
        if key not in self._seen and storage.device.type != "meta":  # those have a size but no memory
            self._seen[key] = storage.nbytes()
            self.live += self._seen[key]
            weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self.live -= self._seen.pop(key)


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
