"""A network is one file: what a stranger adds is built, trained, counted, saved and loaded like
bitfleet's own."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bitfleet.models import ModelConfig, check_images, count, create_model
from bitfleet.optim import OptimConfig, ShardedOptimizer, build_optimizer, is_binary
from bitfleet.trainer.checkpoint import load_initial_weights, load_model
from bitfleet.trainer.checkpoint.config import CheckpointConfig
from bitfleet.trainer.checkpoint.format import model_signature
from bitfleet.trainer.checkpoint.saver import Saver
from bitfleet.trainer.checkpoint.tensors import tensors_to_save
from bitfleet.trainer.ranks.collectives import Ranks

SOURCE = '''
from typing import Any

from torch import Tensor, nn

from bitfleet.models import QuantConv2d, approx_sign
from bitfleet.models.registry import model_options, register_model


class Tiny(nn.Module):
    """A real and a binary convolution, and a classifier."""

    def __init__(self, *, num_classes: int = 10, width: int = 8, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.conv = QuantConv2d(width, width, 3, input_quantizer=approx_sign)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        return self.head((features + self.conv(features)).mean((2, 3)))


@register_model
def tiny(pretrained: bool = False, **options: Any) -> Tiny:
    return Tiny(**model_options("tiny", pretrained, options))
'''
CONFIG = ModelConfig(name="tiny", num_classes=4, width=16)
ALONE = Ranks(0, 1, 0, 1)


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is imported by its path; timm forgets its network afterwards."""
    from timm.models import _registry

    (tmp_path / "tiny_net.py").write_text(SOURCE)
    for registry in ("_model_entrypoints", "_model_to_module", "_module_to_models"):
        monkeypatch.setattr(_registry, registry, getattr(_registry, registry).copy())
    spec = importlib.util.spec_from_file_location("tiny_net", tmp_path / "tiny_net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tiny_net", module)
    spec.loader.exec_module(module)


def trained() -> tuple[nn.Module, ShardedOptimizer]:
    """The network after a step that flips some of its weights."""
    torch.manual_seed(0)
    model = create_model(CONFIG)
    optimizer, _ = build_optimizer(model, OptimConfig(rule="bop"), num_steps=10)
    optimizer.param_groups[0].update(gamma=0.5, threshold=1e-9)
    sharded = ShardedOptimizer(optimizer)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    logits: Tensor = model(torch.randn(4, 3, 16, 16))
    torch.autograd.backward(nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])))
    sharded.step()
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert {"conv.weight", "stem.0.weight", "head.weight"} <= changed
    return model, sharded


def test_its_options_are_those_of_its_signature() -> None:
    assert create_model(CONFIG).get_parameter("head.weight").shape == (4, 16)
    assert create_model(ModelConfig(name="tiny")).get_parameter("head.weight").shape == (1000, 8)
    with pytest.raises(ValueError, match="tiny .*norm.*--model.norm None"):
        create_model(ModelConfig(name="tiny", norm="layer"))
    with pytest.raises(ValueError, match="tiny: pretrained"):
        sys.modules["tiny_net"].tiny(pretrained=True)
    check_images(CONFIG, 32, 8)


def test_its_size_is_counted() -> None:
    size = count(create_model(CONFIG), (3, 16, 16))
    assert size.num_binary_parameters == 16 * 16 * 9
    assert size.num_macs_1bit == 16 * 16 * 9 * 8 * 8
    assert size.num_macs_32bit == 3 * 16 * 9 * 8 * 8 + 16 * 4


@pytest.mark.usefixtures("process_group")
def test_its_weights_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    model, sharded = trained()
    assert all(bool((param.abs() == 1).all()) for param in model.parameters() if is_binary(param))
    saver = Saver(tmp_path / "run", CheckpointConfig(), ALONE, dict)
    saver.save(1, tensors_to_save(model, sharded, ALONE), {"step": 1, "model": model_signature(model)})
    saver.flush()
    assert saver.last is not None
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    for load in (
        lambda other: load_model(other, saver.last),
        lambda other: load_initial_weights(other, CONFIG, saver.last, "none", new_head=False),
        lambda other: load_initial_weights(other, CONFIG, tmp_path / "tiny.safetensors", "none", new_head=False),
    ):
        other = create_model(CONFIG)
        load(other)
        pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    sharded.close()
