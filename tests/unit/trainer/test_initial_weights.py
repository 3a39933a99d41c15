"""Weights to begin from; what Keras' files hold is tests/unit/models/test_keras_weights.py."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitfleet.models import ModelConfig, create_model
from bitfleet.trainer.initial_weights import load_initial_weights

SMALL = ModelConfig(name="birealnet_small", width=8, num_classes=4)


def test_our_own_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = create_model(SMALL), create_model(SMALL)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_initial_weights(other, tmp_path / "w.safetensors", "none")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model, path = create_model(SMALL), tmp_path / "w.safetensors"
    state = model.state_dict()
    for change, sentence in (
        ({"head.bias": torch.zeros(5)}, r"head.bias is \[5\] there and \[4\] in this model"),
        ({"head.extra": torch.zeros(5)}, "this model has no head.extra"),
        ({"blocks.0.conv.weight": None}, r"blocks.0.conv.weight is missing there and \[8, 8, 3, 3\] in this model"),
        (
            {"blocks.0.conv.weight": None, "bits.blocks.0.conv.weight": torch.zeros(3, dtype=torch.uint8)},
            "is missing there",
        ),
    ):
        save_file({name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}, path)
        with pytest.raises(ValueError, match=f"the weights {path} do not fit: .*{sentence}"):
            load_initial_weights(model, path, "none")
    path.write_bytes(b"pickle")
    with pytest.raises(ValueError, match="are not a safetensors file"):
        load_initial_weights(model, path, "none")
    with pytest.raises(ValueError, match="there is no file of initial weights at"):
        load_initial_weights(model, tmp_path / "none.safetensors", "none")
