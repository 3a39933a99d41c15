"""How many runs of a sweep go on at once: by cores, memory and GPUs."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from bitfleet.launch.preflight.tensor_bytes import TensorBytes
from bitfleet.models import create_model
from bitfleet.models.layers.binary_kernels import meta_is_cpu
from bitfleet.optim.rules.rule import RULES
from bitfleet.trainer.config import TrainConfig, resolve_replicas, to_dict

PROCESS_BYTES = 1_000_000_000
"""What a rank holds beside its tensors: libraries, loader, allocator; measured with fashion_small."""
FREE_SHARE = 0.9
"""Of the free memory, what the runs may take."""


class Slots(NamedTuple):
    """Places for runs."""

    environments: tuple[dict[str, str], ...]
    """What each place adds to the environment of its run."""
    threads: int
    """Of a rank."""
    reason: str
    """Why so many, in words."""


def bytes_of_rank(config: TrainConfig, ranks: int) -> int:
    """Estimate the memory of one rank of a run: a pass over a micro-batch of tensors without memory, and optimizer state.

    Raises:
        ValueError: the network cannot be built, or batch and ranks do not divide.
    """
    num_images, size = config.global_batch_size // resolve_replicas(config, ranks), config.data.image_size
    model = create_model(config.model).to("meta")
    with TensorBytes(meta=True) as count, meta_is_cpu(True):
        logits = model(torch.empty((num_images, 3, size, size), device="meta"))
        labels = torch.empty(num_images, dtype=torch.int64, device="meta")
        torch.autograd.backward(nn.functional.cross_entropy(logits, labels))
    state = 4 * sum(param.numel() for param in model.parameters()) * _num_moments(config) // ranks
    return PROCESS_BYTES + state + int(count.peak)


def bytes_of_largest(configs: Sequence[TrainConfig], ranks: int) -> int:
    """The most that one rank of any of these runs will take.

    Raises:
        ValueError: as `bytes_of_rank`.
    """
    largest: dict[str, TrainConfig] = {}
    for config in configs:
        # Of the optimizer, memory depends on the tensors of state of its rule, the more the larger; a network is built once.
        alike = to_dict(config) | {"seed": 0, "run_dir": None, "optim": config.optim.decayed}
        key = json.dumps(alike, sort_keys=True)
        largest[key] = max(largest.get(key, config), config, key=_num_moments)
    return max(bytes_of_rank(config, ranks) for config in largest.values())


def _num_moments(config: TrainConfig) -> int:
    return len(RULES[config.optim.rule].state_keys)


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
    """The places for runs of `ranks` ranks.

    Args:
        ranks: of a run.
        threads: of a rank. None: 1 on a CPU; with GPUs the cores divided by them.
        at_once: runs at once. None: as many as fit.
        cores: of this machine.
        free_bytes: of its memory.
        rank_bytes: what a rank takes of it.
        gpus: names as in CUDA_VISIBLE_DEVICES; each rank gets one. None of them: the runs are on the CPU.

    Raises:
        ValueError: there are not enough GPUs.
    """
    if gpus:
        return _on_gpus(ranks, threads, at_once, cores, gpus)
    threads = threads or 1
    by_cores, by_memory = cores // (ranks * threads), int(FREE_SHARE * free_bytes) // (ranks * rank_bytes)
    number = at_once or max(1, min(by_cores, by_memory))
    reason = (
        f"{cores} cores for {ranks} rank(s) of {threads} thread(s), {free_bytes / 1e9:.1f} GB free for "
        f"{ranks * rank_bytes / 1e9:.1f} GB a run"
    )
    return Slots(({},) * number, threads, reason)


def _on_gpus(ranks: int, threads: int | None, at_once: int | None, cores: int, gpus: Sequence[str]) -> Slots:
    fit = len(gpus) // ranks
    if (at_once or 1) > fit:
        raise ValueError(
            f"{at_once or 1} run(s) at once of {ranks} ranks need {(at_once or 1) * ranks} GPUs, and there are {len(gpus)}: "
            f"pass a smaller --ranks or --at_once, or --device cpu"
        )
    number = at_once or fit
    names = [",".join(gpus[index * ranks : (index + 1) * ranks]) for index in range(number)]
    each = threads or max(1, cores // len(gpus))
    reason = f"{len(gpus)} GPU(s), one for each of the {ranks} rank(s) of a run"
    return Slots(tuple({"CUDA_VISIBLE_DEVICES": name} for name in names), each, reason)
