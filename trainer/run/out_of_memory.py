"""Explain that memory ran out, of a GPU or of the machine: what was requested, what was free, and
what to change."""

import re
import socket

import psutil
import torch

_GPU = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_CPU = ("DefaultCPUAllocator", "Cannot allocate memory", "std::bad_alloc")
"""Parts of the text of a RuntimeError that is about memory: of a GPU, or of the machine."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if `error` is about memory, of a GPU or of the machine; torch has an exception
    class for some of them only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in (*_GPU, *_CPU))


def out_of_memory(error: BaseException) -> str:
    """Return a clause with what was requested and what is free, without torch's advice on its
    allocator."""
    text = " ".join(str(error).split())
    host = socket.gethostname()
    if isinstance(error, MemoryError) or any(part in text for part in _CPU):
        found = re.search(r"tried to allocate (\d+) bytes", text)
        asked = (
            f"tried to allocate {int(found[1]) / 1e9:,.2f} GB" if found else text.split(". ")[0] or "Python got no more"
        )
        free = psutil.virtual_memory().available
        return f"{host} is out of memory ({asked}, {free / 1e9:,.2f} GB are free)"
    found = re.search(r"Tried to allocate .*? is free", text)
    return f"a GPU of {host} is out of memory ({found.group() if found else text.split('. ')[0]})"


def training_out_of_memory(
    error: BaseException, *, precision: str, micro_batch_size: int, num_replicas: int, device: torch.device
) -> str:
    """Return a sentence that says which batch did not fit, and what to change.

    Args:
        error: for which `is_out_of_memory` holds.
        precision: that the run computes in.
        micro_batch_size: images.
        num_replicas: micro-batches per step over all ranks.
        device: of this rank.
    """
    # On a GPU everything that torch has there, on a CPU what the process holds.
    on_gpu = device.type == "cuda"
    taken = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    ways = [
        *_more_replicas(micro_batch_size, num_replicas),
        "a smaller --global_batch_size",
        *(["--engine.precision bf16"] if precision in ("fp32", "tf32") else []),
        "in a validation --data.val_batch_size",
    ]
    return (
        f"{out_of_memory(error)}: a rank trains on {micro_batch_size:,} images at a time in {precision}, "
        f"{taken / 1e9:,.1f} GB are allocated; what helps: {', '.join(ways)}"
    )


def _more_replicas(images: int, num_replicas: int) -> list[str]:
    """Return the next number of replicas that divides the batch, if micro-batches keep two images,
    as BatchNorm needs."""
    parts = next((parts for parts in range(2, images // 2 + 1) if images % parts == 0), None)
    if parts is None:
        return []
    each = "half the images" if parts == 2 else f"{images // parts} images"
    return [f"--num_replicas {parts * num_replicas} (micro-batches of {each})"]
