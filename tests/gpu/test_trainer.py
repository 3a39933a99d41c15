"""The trainer's step on the device: it never waits between logging steps, and as a CUDA graph it
has the same bits."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfleet.configs import load_config
from bitfleet.launch.bench.gpu.trainer import Loader, varied
from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import checkpoints
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.trainer import Trainer
from tests.gpu.waits import PageableCopies, host_waits
from tests.integration.runs import assert_same_bits

pytestmark = pytest.mark.gpu


loaders = pytest.mark.parametrize("loader", ["torch", "memory"])


@contextmanager
def started(
    loader: Loader, run: Path, ranks: Ranks, device: torch.device, is_dry: bool, *, cuda_graph: bool = False
) -> Iterator[Trainer]:
    """Make a trainer of the small Bi-Real Net, before its first step; it does not log."""
    config = varied(load_config("fashion_quickstart"), loader, cuda_graph=cuda_graph)
    metrics = dataclasses.replace(config.metrics, every_steps=1000)
    fields: dict[str, Any] = {"global_batch_size": 8 if is_dry else config.global_batch_size, "metrics": metrics}
    trainer = Trainer(dataclasses.replace(config, run_dir=run, resume=None, **fields), ranks, device)
    trainer.start()
    try:
        yield trainer
    finally:
        trainer.stop()
        assert isinstance(trainer.sharded, ShardedOptimizer)
        trainer.sharded.close()


@loaders
def test_steps_between_logging_steps_do_not_wait_for_the_device(
    loader: Loader, device: torch.device, ranks: Ranks, is_dry: bool, tmp_path: Path
) -> None:
    with started(loader, tmp_path / "run", ranks, device, is_dry) as trainer:
        for _ in range(2 if is_dry else 12):  # compiles, and past DeepSpeed's first steps
            trainer.train_step()
        with host_waits(device) as waits:
            for _ in range(2 if is_dry else 10):
                trainer.train_step()
                trainer.checkpoints.saver.check()
        assert dict(waits.syncs) == {}


@loaders
def test_images_are_copied_from_pinned_memory(
    loader: Loader, device: torch.device, ranks: Ranks, is_dry: bool, tmp_path: Path
) -> None:
    with (
        torch.compiler.set_stance("force_eager"),  # a compiled function refuses to run under a mode
        started(loader, tmp_path / "run", ranks, device, is_dry) as trainer,
    ):
        trainer.train_step()
        with PageableCopies() as copies:
            for _ in range(3):
                trainer.train_step()
        assert dict(copies.places) == {}


@loaders
def test_graph_of_a_step_has_the_bits_of_the_step(
    loader: Loader, device: torch.device, ranks: Ranks, is_dry: bool, tmp_path: Path
) -> None:
    if is_dry:
        pytest.skip("a CUDA graph needs a CUDA device")
    runs = [tmp_path / "eager", tmp_path / "graph"]
    for run, cuda_graph in zip(runs, (False, True), strict=True):
        with started(loader, run, ranks, device, is_dry, cuda_graph=cuda_graph) as trainer:
            for _ in range(60):  # more than an epoch of 46 steps
                trainer.train_step()
            trainer.save()
            trainer.checkpoints.saver.flush()
    eager, graph = map(tensors, runs)
    assert any(name.startswith("optim.exp_avg_sq") for name in eager)
    assert_same_bits(eager, graph)


def tensors(run: Path) -> dict[str, Tensor]:
    """Return weights, buffers and moments of the newest checkpoint."""
    return checkpoint_tensors.read(checkpoints(run)[-1], "")
