"""Decide whether a run's network is compiled, and when its compiled code is used."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.compiler import set_stance
from torch.optim import Optimizer

from bitfleet.models.compilation import problem_of_compiling
from bitfleet.optim import ShardedOptimizer
from bitfleet.optim.param_groups import starts_real
from bitfleet.trainer.ranks.collectives import all_gather_objects


def is_compiled(compile: str, device: torch.device, sharding: str, was_compiled: bool | None) -> bool:
    """Return whether the network is compiled, the same on all ranks; every rank calls this.

    If one of the ranks cannot compile, none does, after one warning.

    Args:
        compile: `model.compile` of the run: "on", "off" or "auto".
        device: where the model runs.
        sharding: of the run.
        was_compiled: whether that of the checkpoint to resume from was; None for a new run.
    """
    wanted = compile == "on"
    if compile == "auto":
        wanted = device.type == "cuda" and sharding != "zero3" if was_compiled is None else was_compiled
    if not wanted:
        return False
    problems = all_gather_objects(problem_of_compiling(device))
    bad = [(rank, problem) for rank, problem in enumerate(problems) if problem]
    if bad:
        rank, problem = bad[0]
        warnings.warn(
            f"the network runs in eager torch, slower: rank {rank} cannot compile: {problem}", RuntimeWarning, 2
        )
    return not bad


def eager_on_real_weights(compiled: bool, device: torch.device, optimizer: Optimizer) -> AbstractContextManager[Any]:
    """Run a compiled network in eager torch inside if its binary weights are still real: the
    kernels of a CPU know bits only.

    Args:
        compiled: whether the network is.
        device: where it runs.
        optimizer: of the network.
    """
    if not compiled or device.type != "cpu":
        return nullcontext()
    if isinstance(optimizer, ShardedOptimizer) and not any(bucket.real for bucket in optimizer.buckets):
        return nullcontext()
    if optimizer.state or not starts_real(optimizer):
        return nullcontext()
    eagerly: AbstractContextManager[Any] = set_stance("force_eager")
    return eagerly
