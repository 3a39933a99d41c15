"""The trainer's step on the device: it never waits between logging steps, and as a CUDA graph it
has the same bits."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from bitfleet.configs import load_config
from bitfleet.launch.bench.gpu.trainer import Loader, Variant, varied
from bitfleet.launch.bench.gpu.waits import PageableCopies, host_waits
from bitfleet.launch.data.teach import teach
from bitfleet.optim import ShardedOptimizer
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.format import checkpoints
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.distillation import DistillConfig
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.trainer import Trainer
from tests.integration.runs import assert_same_bits

pytestmark = pytest.mark.gpu


loaders = pytest.mark.parametrize("loader", ["torch", "memory"])


def config_of(variant: Variant, run: Path, is_dry: bool, **further: Any) -> TrainConfig:
    """Return a run of the small Bi-Real Net; it does not log."""
    config = load_config("fashion_quickstart")
    metrics = dataclasses.replace(config.metrics, every_steps=1000)
    fields: dict[str, Any] = {"global_batch_size": 8 if is_dry else config.global_batch_size, "metrics": metrics}
    return varied(config, variant, run, Path(), **fields, **further)


@contextmanager
def started(
    variant: Variant, run: Path, ranks: Ranks, device: torch.device, is_dry: bool, **further: Any
) -> Iterator[Trainer]:
    """Make a trainer, before its first step."""
    trainer = Trainer(config_of(variant, run, is_dry, **further), ranks, device)
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
    with started(Variant(loader), tmp_path / "run", ranks, device, is_dry) as trainer:
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
        started(Variant(loader), tmp_path / "run", ranks, device, is_dry) as trainer,
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
        with started(Variant(loader, cuda_graph), run, ranks, device, is_dry) as trainer:
            for _ in range(60):  # more than an epoch of 46 steps
                trainer.train_step()
            trainer.save()
            trainer.checkpoints.saver.flush()
    eager, graph = map(tensors, runs)
    assert any(name.startswith("optim.exp_avg_sq") for name in eager)
    assert_same_bits(eager, graph)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A tiny teacher."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(1)
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return DistillConfig(teacher="test_resnet", weights=path)


def test_a_cache_has_the_bits_of_a_teacher_and_neither_waits(
    teacher: DistillConfig, device: torch.device, ranks: Ranks, is_dry: bool, tmp_path: Path
) -> None:
    """On a device the teacher computes in bf16."""
    cached = dataclasses.replace(teacher, cache=tmp_path / "logits")
    variant = Variant("memory")
    config = config_of(variant, tmp_path, is_dry, distill=cached)
    assert len(list(teach(config, 0, 0, ranks, device))) == 2
    (file,) = (tmp_path / "logits").glob("*/manifest.json")
    manifest = json.loads(file.read_text())
    assert manifest["identity"]["precision"] == ("fp32" if is_dry else "bf16")
    for name, distill in (("called", teacher), ("cached", cached)):
        further = {"distill": distill, "stop_after_steps": 22}
        with started(variant, tmp_path / name, ranks, device, is_dry, **further) as trainer:
            for _ in range(2 if is_dry else 12):
                trainer.train_step()
            with host_waits(device) as waits:
                for _ in range(2 if is_dry else 10):
                    trainer.train_step()
            assert dict(waits.syncs) == {}
            trainer.save()
            trainer.checkpoints.saver.flush()
    assert_same_bits(tensors(tmp_path / "called"), tensors(tmp_path / "cached"))


def test_graph_of_a_distilled_step_has_the_bits_of_the_step(
    teacher: DistillConfig, device: torch.device, ranks: Ranks, is_dry: bool, tmp_path: Path
) -> None:
    if is_dry:
        pytest.skip("a CUDA graph needs a CUDA device")
    runs = [tmp_path / "eager", tmp_path / "graph"]
    for run, cuda_graph in zip(runs, (False, True), strict=True):
        with started(Variant("memory", cuda_graph), run, ranks, device, is_dry, distill=teacher) as trainer:
            for _ in range(60):
                trainer.train_step()
            trainer.save()
            trainer.checkpoints.saver.flush()
    assert_same_bits(*map(tensors, runs))


def tensors(run: Path) -> dict[str, Tensor]:
    """Return weights, buffers and moments of the newest checkpoint."""
    return checkpoint_tensors.read(checkpoints(run)[-1], "")
