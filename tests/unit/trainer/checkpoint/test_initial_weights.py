"""Weights to begin from; what Keras' files hold is tests/unit/models/keras/test_weights.py."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitfleet.models import ModelConfig, create_model
from bitfleet.trainer.checkpoint.initial_weights import load_initial_weights

SMALL = ModelConfig(name="birealnet_small", width=8, num_classes=4)


def load(model: nn.Module, path: Path, config: ModelConfig = SMALL, *, new_head: bool = False) -> None:
    load_initial_weights(model, config, path, "none", new_head=new_head)


def test_our_own_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = create_model(SMALL), create_model(SMALL)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    load(other, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model, path = create_model(SMALL), tmp_path / "w.safetensors"
    state = model.state_dict()
    for change, sentence in (
        ({"head.bias": torch.zeros(5)}, r"head.bias .*\[5\].*\[4\]"),
        ({"head.extra": torch.zeros(5)}, "head.extra"),
        ({"blocks.0.conv.weight": None}, r"blocks.0.conv.weight .*missing.*\[8, 8, 3, 3\]"),
        (
            {"blocks.0.conv.weight": None, "bits.blocks.0.conv.weight": torch.zeros(3, dtype=torch.uint8)},
            "blocks.0.conv.weight .*missing",
        ),
    ):
        save_file({name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}, path)
        with pytest.raises(ValueError, match=f"{path}.*{sentence}"):
            load(model, path)
    path.write_bytes(b"pickle")
    with pytest.raises(ValueError, match=f"{path}.*not a safetensors file"):
        load(model, path)
    with pytest.raises(ValueError, match="none.safetensors"):
        load(model, tmp_path / "none.safetensors")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_names_of_wrapped_networks(prefix: str, tmp_path: Path) -> None:
    model, other = create_model(SMALL), create_model(SMALL)
    save_file({prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    load(other, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["birealnet_small", "binarynet"])
def test_another_number_of_classes_takes_a_new_head(name: str, tmp_path: Path) -> None:
    four, six = ModelConfig(name=name, num_classes=4), ModelConfig(name=name, num_classes=6)
    model, other = create_model(four), create_model(six)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"(head|classifier)\..*--init_head new"):
        load(other, tmp_path / "w.safetensors", six)
    load(other, tmp_path / "w.safetensors", six, new_head=True)
    for key, tensor in model.state_dict().items():
        is_head = tensor.shape != before[key].shape
        assert is_head == (key.startswith(("head.", "classifier.5.", "classifier.6.")) and tensor.dim() > 0), key
        assert torch.equal(other.state_dict()[key], before[key] if is_head else tensor), key


@pytest.mark.parametrize("name", ["w.pth", "w.pth.tar"])
def test_state_dicts_of_torch_save(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = create_model(SMALL).state_dict()
    for content in (state, {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}):
        torch.save(content, tmp_path / name)
        load(other := create_model(SMALL), tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, ("ran", "w")


def test_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content, sentence in (
        ({"state_dict": create_model(SMALL).state_dict(), "args": Evil()}, "without running code.*convert"),
        ([1, 2], "neither a state_dict"),
        ({"epoch": 1}, "neither a state_dict"),
        ({0: torch.zeros(3)}, "neither a state_dict"),
    ):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rf"w\.pth .*{sentence}"):
            load(create_model(SMALL), tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "w.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"w\.pth"):
        load(create_model(SMALL), tmp_path / "w.pth")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}.*no checkpoint.*--init"):
        load(create_model(SMALL), tmp_path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.h5"])
def test_a_file_that_this_user_may_not_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read: allow this user"):
        load(create_model(SMALL), tmp_path / name)
