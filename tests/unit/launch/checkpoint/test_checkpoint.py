"""`bitfleet checkpoint`: what it prints and writes of two small checkpoints, and what damage
does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bitfleet.launch.checkpoint.command import checkpoint
from bitfleet.models import ModelConfig, create_model
from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer
from bitfleet.trainer.checkpoint import CheckpointConfig, model_signature
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.checkpoint.tensors import tensors_to_save, unpacked
from bitfleet.trainer.ranks.collectives import Ranks

pytestmark = pytest.mark.usefixtures("process_group")
ALONE = Ranks(0, 1, 0, 1)
WEIGHT = "blocks.0.conv.weight"


def save(run: Path, *, change: bool = False) -> tuple[Path, nn.Module]:
    """A checkpoint of a network that has not been trained; `change` turns the sign of one
    weight."""
    torch.manual_seed(0)
    model = create_model(ModelConfig(name="birealnet_small", width=8, num_classes=4))
    optimizer, _ = build_optimizer(model, OptimConfig(), num_steps=10)
    if change:
        model.get_parameter(WEIGHT).data.view(-1)[13] *= -1
    sharded = ShardedOptimizer(optimizer)
    position = {"step": 3, "epoch": 0, "sample_offset": 12, "skipped_steps": 1, "world_size": 1, "num_replicas": 2}
    texts = {"metrics": {}, "schedules": {}, "versions": {"torch": "2"}}
    config = {"model": {"name": "birealnet_small"}, "optim": {"rule": "bop2ndorder"}}
    saver = Saver(run, CheckpointConfig(), ALONE, dict)
    meta = {**position, **texts, "config": config, "model": model_signature(model)}
    saver.save(3, tensors_to_save(model, sharded, ALONE), meta)
    saver.flush()
    sharded.close()
    assert saver.last is not None
    return saver.last, model


def test_inspect_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = save(tmp_path)
    checkpoint(["inspect", str(tmp_path)])
    output = capsys.readouterr().out
    assert output.startswith(str(path))
    assert "step 3 " in output
    (line,) = [line for line in output.splitlines() if f"bits.{WEIGHT}" in line]
    assert line.split() == [f"bits.{WEIGHT}", "uint8", "72", "72", "1"]
    checkpoint(["verify", str(path)])
    assert "1 files" in capsys.readouterr().out
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=file.name):
        checkpoint(["verify", str(path)])
    with pytest.raises(ValueError, match=file.name):
        checkpoint(["weights", str(path), str(tmp_path / "w.safetensors")])
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_weights(packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = save(tmp_path)
    out = tmp_path / "w.safetensors"
    checkpoint(["weights", str(path), str(out), *["--packed"] * packed])
    assert str(out) in capsys.readouterr().out
    written, weight = load_file(out), model.get_parameter(WEIGHT)
    stored = unpacked(written[f"bits.{WEIGHT}"], weight.shape) if packed else written[WEIGHT]
    assert torch.equal(stored, weight)
    assert torch.equal(written["head.weight"], model.get_parameter("head.weight"))
    with pytest.raises(ValueError, match=r"w\.safetensors.*w\.bin"):
        checkpoint(["weights", str(path), str(tmp_path / "w.bin")])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "w.safetensors"]


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, _ = save(tmp_path / "a")
    for folder, change, code in (("b", False, 0), ("c", True, 1)):
        other, _ = save(tmp_path / folder, change=change)
        with pytest.raises(SystemExit) as leaving:
            checkpoint(["diff", str(a), str(other)])
        assert int(leaving.value.code or 0) == code
    assert f"bits.{WEIGHT} differs first at element 13: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=str(tmp_path)):
        checkpoint(["diff", str(tmp_path), str(tmp_path)])
