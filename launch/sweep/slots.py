"""Find how many runs of a sweep fit on this machine at once: by cores, memory and GPUs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.models import create_model
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.config import TrainConfig, resolve_replicas

PROCESS_BYTES = 1_000_000_000
"""Memory of a rank besides its tensors: libraries, loader, allocator; measured with fashion_small."""
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

    It is PROCESS_BYTES, fp32 parameters, gradients and whole optimizer state, and twice the fp32 outputs of all layers
    for a micro-batch: activations that backward needs, their gradients, and operations between layers.

    Raises:
        ValueError: the network cannot be built, or batch and ranks do not divide.
    """
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
    num_copies = 2 + max(len(RULES[rule].state_keys) for rule in (config.optim.rule, "keras_adam"))
    return PROCESS_BYTES + 4 * (num_copies * sum(map(Tensor.numel, model.parameters())) + 2 * batch * sum(outputs))


def bytes_of_largest(configs: Sequence[TrainConfig], ranks: int) -> int:
    """Return the most that one rank of any of these runs takes.

    Raises:
        ValueError: as `bytes_of_rank`.
    """
    # Runs that differ in nothing else take the same memory.
    distinct = {
        (str(c.model), c.data.image_size, c.global_batch_size, c.num_replicas, len(RULES[c.optim.rule].state_keys)): c
        for c in configs
    }
    return max(bytes_of_rank(config, ranks) for config in distinct.values())


def find_slots(
    *,
    ranks: int,
    threads: int | None,
    at_once: int | None,
    cores: int,
    free_bytes: int,
    rank_bytes: int,
    gpus: Sequence[str],
) -> Slots:
    """Return the places for runs of `ranks` ranks.

    Args:
        ranks: ranks per run.
        threads: threads per rank. None: 1 on a CPU; with GPUs the cores divided by them.
        at_once: number of runs at once. None: as many as fit.
        cores: cores of this machine.
        free_bytes: its free memory.
        rank_bytes: memory that one rank takes.
        gpus: names as in CUDA_VISIBLE_DEVICES, one per rank. Empty: the runs are on the CPU.

    Raises:
        ValueError: there are not enough GPUs.
    """
    if gpus:
        number = at_once or max(1, len(gpus) // ranks)
        if number * ranks > len(gpus):
            raise ValueError(
                f"{number} run(s) at once of {ranks} ranks need {number * ranks} GPUs, and there are {len(gpus)}: "
                f"pass a smaller --ranks or --at_once, or --device cpu"
            )
        names = [",".join(gpus[index * ranks : (index + 1) * ranks]) for index in range(number)]
        reason = f"{len(gpus)} GPU(s), one for each of the {ranks} rank(s) of a run"
        environments = tuple({"CUDA_VISIBLE_DEVICES": name} for name in names)
        return Slots(environments, threads or max(1, cores // len(gpus)), reason)
    threads = threads or 1
    by_cores, by_memory = cores // (ranks * threads), int(FREE_SHARE * free_bytes) // (ranks * rank_bytes)
    reason = (
        f"{cores} cores for {ranks} rank(s) of {threads} thread(s), {free_bytes / 1e9:.1f} GB free for "
        f"{ranks * rank_bytes / 1e9:.1f} GB per run"
    )
    return Slots(({},) * (at_once or max(1, min(by_cores, by_memory))), threads, reason)
