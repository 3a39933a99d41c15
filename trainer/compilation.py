"""Whether a run's network is compiled."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from bitfleet.models.compilation import problem_of_compiling
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.distributed import objects_from_ranks
from bitfleet.trainer.run_checkpoints import was_compiled


def is_compiled(config: TrainConfig, device: torch.device, begun: Mapping[str, Any] | None) -> bool:
    """What `model.compile` comes to, the same on all ranks; every rank calls this.

    Where one of the ranks cannot compile, none does, after one warning.

    Args:
        config: the run.
        device: where the model runs.
        begun: meta.json of the checkpoint that is continued; None for a new run.
    """
    wanted = config.model.compile == "on"
    if config.model.compile == "auto":
        wanted = was_compiled(begun) if begun else device.type == "cuda" and config.engine.sharding != "zero3"
    if not wanted:
        return False
    problems = objects_from_ranks(problem_of_compiling(device))
    bad = [(rank, problem) for rank, problem in enumerate(problems) if problem]
    if bad:
        rank, problem = bad[0]
        warnings.warn(
            f"the network runs in eager torch, slower: rank {rank} cannot compile: {problem}", RuntimeWarning, 2
        )
    return not bad
