"""What a run says when a GPU has no memory left: what it asked for, what it had, and what to change."""

import re
import socket

import torch

from bitfleet.trainer.config import TrainConfig


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """Say in a clause what was asked for and what is free, without torch's advice on its allocator."""
    text = " ".join(str(error).split())
    found = re.search(r"Tried to allocate .*? is free", text)
    return f"a GPU of {socket.gethostname()} is out of memory ({found.group() if found else text.split('. ')[0]})"


def training_out_of_memory(
    error: torch.OutOfMemoryError, config: TrainConfig, *, num_replicas: int, device: torch.device, predicted: int
) -> str:
    """Say in a sentence which batch did not fit, and what to change.

    Args:
        error: of torch.
        config: of the run; its precision is the one that it computes in.
        num_replicas: micro-batches per step over all ranks.
        device: of this rank.
        predicted: bytes that a rank was to need at most.
    """
    images = config.global_batch_size // num_replicas
    # Everything that torch has on the GPU; on a CPU, in tests, there is no such number.
    taken = f", {torch.cuda.max_memory_allocated(device) / 1e9:,.1f} GB allocated" if device.type == "cuda" else ""
    ways = [
        f"--num_replicas {2 * num_replicas} (micro-batches of half the images)",
        "a smaller --global_batch_size",
        *(["--engine.precision bf16"] if config.engine.precision in ("fp32", "tf32") else []),
        "in a validation --data.val_batch_size",
    ]
    return (
        f"{out_of_memory(error)}: a rank trains on {images:,} images at a time in {config.engine.precision}, "
        f"{predicted / 1e9:,.1f} GB were predicted{taken}; what helps: {', '.join(ways)}"
    )
