"""Find how many runs of a sweep fit on this machine at once: by cores, memory and GPUs."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.launch.doctor.facts import free_memory
from bitfleet.launch.job import num_cores
from bitfleet.launch.text import gigabytes
from bitfleet.models import check_images, create_model
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.config import TrainConfig, resolve_replicas

PROCESS_BYTES = 1_000_000_000
"""Memory of a rank besides its tensors: libraries, loader, allocator; measured with
fashion_small."""
FREE_SHARE = 0.9
"""Fraction of the free memory that the runs may take."""


class Slots(NamedTuple):
    """Places for runs."""

    environments: tuple[dict[str, str], ...]
    """Environment variables that each place adds to its run."""
    threads: int
    """Threads per rank."""
    reason: str
    """Explanation of the number of places."""


def bytes_of_rank(config: TrainConfig, ranks: int) -> int:
    """Estimate the memory that one rank of a run takes, as an upper bound.

    It is PROCESS_BYTES, fp32 parameters, gradients and whole optimizer state, and twice the fp32
    outputs of all layers for a micro-batch: activations that backward needs, their gradients, and
    operations between layers.

    Raises:
        ValueError: the network cannot be built, its images are too small for it, or batch and ranks
            do not divide.
    """
    check_images(config.model, config.data.image_size, 2)
    outputs: list[int] = []

    def note(_: nn.Module, __: object, output: Tensor) -> None:
        outputs.append(output.numel())

    model, size = create_model(config.model).eval(), config.data.image_size
    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    batch = config.global_batch_size // resolve_replicas(config, ranks)
    num_copies = 2 + max(len(RULES[rule].state_keys) for rule in (config.optim.rule, config.optim.full_precision))
    return PROCESS_BYTES + 4 * (num_copies * sum(map(Tensor.numel, model.parameters())) + 2 * batch * sum(outputs))


def bytes_of_largest(configs: Sequence[TrainConfig], ranks: int) -> int:
    """Return the most that one rank of any of these runs takes.

    Raises:
        ValueError: as `bytes_of_rank`.
    """
    # Runs that differ in nothing else take the same memory.
    distinct = {
        (
            str(c.model),
            c.data.image_size,
            c.global_batch_size,
            c.num_replicas,
            len(RULES[c.optim.rule].state_keys),
            c.optim.full_precision,
        ): c
        for c in configs
    }
    return max(bytes_of_rank(config, ranks) for config in distinct.values())


def find_slots(configs: Sequence[TrainConfig], ranks: int, at_once: int | None = None) -> Slots:
    """Return the places on this machine for runs of `configs` on `ranks` ranks; each fits the
    largest of them.

    Without `at_once`, they are as many as fit. A rank has 1 thread on a CPU, and its share of the
    cores with a GPU, unless the configurations set it; each rank gets one GPU of
    CUDA_VISIBLE_DEVICES.

    Raises:
        ValueError: there are not enough GPUs, or a run cannot be built.
    """
    threads = max((config.num_threads for config in configs if config.num_threads), default=None)
    if gpus := visible_gpus() if any(config.device != "cpu" for config in configs) else []:
        number = at_once or max(1, len(gpus) // ranks)
        if number * ranks > len(gpus):
            raise ValueError(
                f"{number} run(s) at once of {ranks} ranks need {number * ranks} GPUs, and there are {len(gpus)}: "
                f"pass a smaller --ranks or --at_once, or --device cpu"
            )
        names = [",".join(gpus[index * ranks : (index + 1) * ranks]) for index in range(number)]
        reason = f"{len(gpus)} GPU(s), one for each of the {ranks} rank(s) of a run"
        environments = tuple({"CUDA_VISIBLE_DEVICES": name} for name in names)
        return Slots(environments, threads or max(1, num_cores() // len(gpus)), reason)
    threads = threads or 1
    if at_once:
        return Slots(({},) * at_once, threads, "--at_once")
    cores, free_bytes, run_bytes = num_cores(), free_memory(), ranks * bytes_of_largest(configs, ranks)
    reason = (
        f"{cores} cores for {ranks} rank(s) of {threads} thread(s), {gigabytes(free_bytes)} free for "
        f"{gigabytes(run_bytes)} per run"
    )
    number = max(1, min(cores // (ranks * threads), int(FREE_SHARE * free_bytes) // run_bytes))
    return Slots(({},) * number, threads, reason)


def visible_gpus() -> list[str]:
    """Return the names of the GPUs as in CUDA_VISIBLE_DEVICES; none without CUDA."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
