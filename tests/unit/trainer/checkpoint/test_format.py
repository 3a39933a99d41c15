"""Checkpoint folders: hashes, what is kept, what is refused; tensors that are written on one rank
and read back."""

import errno
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer
from bitfleet.trainer.checkpoint import tensors as checkpoint_tensors
from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.checkpoint.format import (
    check_meta,
    checkpoints,
    file_facts,
    read_meta,
    remove,
    set_aside,
    superseded,
    verify,
    write_meta,
)
from bitfleet.trainer.checkpoint.loader import ValidCheckpoint, find_resume_checkpoint, load
from bitfleet.trainer.checkpoint.run_folder import RunFolder
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.ranks.collectives import Ranks, cpu_group

ALONE = Ranks(0, 1, 0, 1)
SMALL = ModelConfig(name="birealnet_small", width=8, num_classes=4)


def make(run: Path, step: int, content: bytes = b"weights") -> Path:
    """A committed checkpoint with one file that is not tensors."""
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    file = path / "shard-00001-model-00001-of-00001.safetensors"
    file.write_bytes(content)
    write_meta(path, {"step": step, "files": {file.name: file_facts(file)}})
    return path


def test_verify_finds_every_kind_of_damage(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    file = path / "shard-00001-model-00001-of-00001.safetensors"
    assert verify(path)["step"] == 5
    file.write_bytes(b"weightz")
    with pytest.raises(ValueError, match=r"step-00000005 .*shard-00001.*sha256"):
        verify(path)
    file.write_bytes(b"weigh")
    with pytest.raises(ValueError, match="5 bytes .* 7"):
        verify(path)
    file.unlink()
    with pytest.raises(ValueError, match="No such file or directory"):
        verify(path)
    file.write_bytes(b"weights")
    (path / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="shard-00002-model-00001-of-00001.safetensors"):
        verify(path)


def test_changed_meta_is_found(tmp_path: Path) -> None:
    path = make(tmp_path, 5)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"step": 6}))
    with pytest.raises(ValueError, match="damaged: meta.json"):
        read_meta(path)
    for text in ("", "[]", '{"step": 5}', "\x00"):
        (path / "meta.json").write_text(text)
        with pytest.raises(ValueError, match="no readable meta.json"):
            read_meta(path)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(keep_last=1), {20, 60}),  # 20 is the best
        (CheckpointConfig(keep_last=3, keep_best=False), {40, 50, 60}),
        (CheckpointConfig(keep_last=1, keep_every_steps=30), {20, 30, 60}),
    ],
)
def test_what_is_kept(config: CheckpointConfig, kept: set[int], tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        make(tmp_path, step)
    top1 = {10: 0.3, 20: 0.7, 40: 0.5, 70: 0.9}
    gone = superseded(checkpoints(tmp_path), config, top1)
    assert {int(path.name[5:]) for path in checkpoints(tmp_path) if path not in gone} == kept


def test_damaged_ones_keep_a_name_of_their_own(tmp_path: Path) -> None:
    for place in ("damaged-step-00000005", "damaged-step-00000005-2"):
        assert set_aside(make(tmp_path, 5)).name == place
    assert checkpoints(tmp_path) == []


def test_a_file_that_another_process_reads_over_nfs_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, 1)

    def busy(folder: str, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", folder)

    monkeypatch.setattr(os, "rmdir", busy)
    remove(path)
    assert checkpoints(tmp_path) == []


@pytest.mark.usefixtures("process_group")
def test_newest_intact_one_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [make(tmp_path, step) for step in (1, 2, 3)]
    (paths[2] / "meta.json").unlink()
    next(paths[1].glob("*.safetensors")).write_bytes(b"?")
    folder = RunFolder(tmp_path, paths[2])
    valid = find_resume_checkpoint(folder, ALONE)
    assert valid is not None
    assert valid.path == paths[0]
    assert capfd.readouterr().err.count("is damaged") == 2
    next(paths[0].glob("*.safetensors")).write_bytes(b"?")
    with pytest.raises(ValueError, match="no checkpoint of .*step-00000001: .*start over .*--run_dir"):
        find_resume_checkpoint(folder, ALONE)
    assert find_resume_checkpoint(folder, ALONE) is None


@pytest.mark.usefixtures("process_group")
def test_a_checkpoint_that_the_user_named_is_not_replaced_by_another(tmp_path: Path) -> None:
    older, newer = (make(tmp_path, step) for step in (1, 2))
    branch = RunFolder(tmp_path / "branch", older, branches=True)
    valid = find_resume_checkpoint(branch, ALONE)
    assert valid is not None
    assert valid.path == older
    next(older.glob("*.safetensors")).write_bytes(b"?")
    with pytest.raises(ValueError, match="step-00000001 is damaged"):
        find_resume_checkpoint(branch, ALONE)
    assert checkpoints(tmp_path) == [older, newer]
    assert find_resume_checkpoint(RunFolder(tmp_path / "new", None), ALONE) is None


def test_another_run_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is 0.* 1.*configuration"):
        check_meta({"seed": 0}, {"seed": 1}, Path("x"))
    with pytest.raises(ValueError, match="world_size is 2.* 1.*number of ranks"):
        check_meta({"world_size": 2}, {"world_size": 1}, Path("x"))


def build(seed: int, *, sharded: bool) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = create_model(SMALL)
    optimizer, _ = build_optimizer(model, OptimConfig(), num_steps=10)
    return model, ShardedOptimizer(optimizer, num_replicas=1, bucket_numel=5000) if sharded else optimizer


def train(model: nn.Module, optimizer: Any, num_steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_steps):
        logits = model(torch.randn(4, 3, 32, 32, generator=generator))
        torch.autograd.backward(logits.square().mean())
        optimizer.step()
        optimizer.zero_grad()


def save(run: Path, model: nn.Module, optimizer: Any, step: int) -> Path:
    saver = Saver(run, CheckpointConfig(), ALONE, dict)
    meta = {
        "step": step,
        "skipped_steps": 0,
        "optimizer_steps": optimizer.steps(),
        "model": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "config": {"model": {}},
    }
    saver.save(step, checkpoint_tensors.tensors_to_save(model, optimizer, ALONE), meta)
    train(model, optimizer, 1)  # what is written is the copy
    saver.flush()
    assert saver.last is not None
    return saver.last


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("written", "read"), [(True, True), (False, False), (True, False), (False, True)])
def test_sharded_and_plain_optimizers_read_each_others_state(written: bool, read: bool, tmp_path: Path) -> None:
    model, optimizer = build(0, sharded=written)
    train(model, optimizer, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = save(tmp_path, model, optimizer, 3)
    other, second = build(1, sharded=read)
    load(other, second, ValidCheckpoint(path, verify(path)))
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    train(other, second, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.usefixtures("process_group")
def test_binary_weights_cost_one_bit(tmp_path: Path) -> None:
    model, optimizer = build(0, sharded=True)
    binary = sum(param.numel() for param in model.parameters() if getattr(param, "binary", False))
    other = sum(param.numel() for param in model.parameters()) - binary
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    tensors = checkpoint_tensors.tensors_to_save(model, optimizer, ALONE)
    assert checkpoint_tensors.total_bytes(tensors) == binary // 8 + 8 * (binary + other) + 4 * other + buffers


@pytest.mark.usefixtures("process_group")
def test_saving_from_the_cpu_starts_no_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("CUDA was asked for")

    model, optimizer = build(0, sharded=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "current_device", "current_stream", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, fail)
    assert save(tmp_path, model, optimizer, 3).is_dir()


@pytest.mark.usefixtures("process_group")
def test_failed_save_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(0, sharded=True)
    saver = Saver(tmp_path, CheckpointConfig(), ALONE, dict)
    tensors = checkpoint_tensors.tensors_to_save(model, optimizer, ALONE)

    def rename(source: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28), str(target))

    with monkeypatch.context() as patch:
        patch.setattr("bitfleet.trainer.checkpoint.saver.os.rename", rename)
        saver.save(7, tensors, {"step": 7})
        with pytest.raises(ValueError, match="step 7 .*No space left on device"):
            saver.flush()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    saver.save(8, tensors, {"step": 8})
    saver.flush()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000008"]


@pytest.mark.usefixtures("process_group")
def test_metrics_that_change_during_a_save_do_not_damage_it(tmp_path: Path) -> None:
    """The dictionary of the latest metrics is the run's own: a validation writes into it while the
    files are written."""
    model, optimizer = build(0, sharded=True)
    metrics: dict[str, dict[str, float]] = {"validation": {"step": 6}}

    class Slow(Saver):
        def write_meta(self, temporary: Path, meta: Mapping[str, Any]) -> None:
            metrics["validation"]["step"] = 7
            metrics["train"] = {"step": 7}
            super().write_meta(temporary, meta)

    saver = Slow(tmp_path, CheckpointConfig(), ALONE, dict)
    saver.save(6, checkpoint_tensors.tensors_to_save(model, optimizer, ALONE), {"step": 6, "metrics": metrics})
    saver.flush()
    assert read_meta(checkpoints(tmp_path)[0])["metrics"] == {"validation": {"step": 6}}


def test_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    for content in (pickle.dumps(os.getcwd), b"\xff" * 100, (1 << 60).to_bytes(8, "little") + b"{}"):
        (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=str(tmp_path)):
            checkpoint_tensors.contents(tmp_path)
    save_file({"model.x": torch.zeros(3)}, tmp_path / "shard-00001-model-00001-of-00001.safetensors")
    assert list(checkpoint_tensors.contents(tmp_path)) == ["model.x"]


@pytest.mark.usefixtures("process_group")
def test_groups_belong_to_the_present_process_group() -> None:
    assert cpu_group("control") is cpu_group("control")
    assert cpu_group("control") is not cpu_group("save")


@pytest.mark.usefixtures("process_group")
def test_files_have_the_mode_of_other_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = tmp_path / "new"
        folder.mkdir()
        checkpoint_tensors.write({"model.weight": torch.ones(3)}, folder, cpu_group("save"))
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.usefixtures("process_group")
def test_weights_of_bnew_are_stored_as_values_until_they_are_signs() -> None:
    model = create_model(SMALL)
    optimizer, _ = build_optimizer(model, OptimConfig(rule="bnew"), num_steps=10)
    sharded = ShardedOptimizer(optimizer)
    model(torch.randn(4, 3, 28, 28)).square().mean().backward()
    sharded.step()
    name = "blocks.0.conv.weight"
    stored = checkpoint_tensors.tensors_to_save(model, sharded, ALONE)
    assert not any(key.startswith(checkpoint_tensors.BITS) for key in stored)
    assert torch.equal(stored[f"model.{name}"], model.get_parameter(name))
    optimizer.param_groups[0]["free"] = 0.0
    model(torch.randn(4, 3, 28, 28)).square().mean().backward()
    sharded.step()
    stored = checkpoint_tensors.tensors_to_save(model, sharded, ALONE)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert f"bits.{name}" in stored
    assert torch.equal(checkpoint_tensors.model_state(stored, shapes)[name], model.get_parameter(name))
    sharded.close()
