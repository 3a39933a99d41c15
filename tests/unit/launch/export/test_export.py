"""`bitfleet export` of a file of weights, and what it refuses; runs are exported by
tests/integration/test_export.py."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from bitfleet.launch.export.command import export
from bitfleet.launch.export.export import load_trained, logits_of
from bitfleet.models import ModelConfig, create_model
from bitfleet.packed import load

NETWORK = ModelConfig(name="birealnet_small", width=8, num_classes=10)
OPTIONS = "--config fashion_quickstart --model.width 8".split()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(create_model(NETWORK).state_dict(), path)
    return path


def test_weights_and_configuration(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "net"
    export([str(weights), str(output), *OPTIONS])
    text = capsys.readouterr().out
    assert f"{output}: " in text
    assert "18,432 weights as bits" in text
    assert "checked on 16 random images" in text
    runner = load(output)
    assert runner.image_size == (32, 32, 3)
    assert runner.description["network"] == "birealnet_small"
    assert runner.description["preprocessing"] == {"geometry": "crop", "image_size": 32}
    assert runner.description["classes"][9] == "9_ankle-boot"
    trained = load_trained(weights, OPTIONS)
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    expected = logits_of(trained.model, images, trained.config.data)
    assert np.abs(runner(images) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_another_image_size(weights: Path, tmp_path: Path) -> None:
    export([str(weights), str(tmp_path / "net"), "--image_size", "45", *OPTIONS])
    assert load(tmp_path / "net").image_size == (45, 45, 3)


def test_classes_without_the_data_are_numbers(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export([str(weights), str(tmp_path / "net"), *OPTIONS, "--data.root", str(tmp_path / "nowhere")])
    assert load(tmp_path / "net").description["classes"] == [str(label) for label in range(10)]
    assert f"classes are numbered: {tmp_path / 'nowhere'} is not here" in capsys.readouterr().out


def refused(*arguments: object) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        export([str(argument) for argument in arguments])
    return str(caught.value)


def test_refusals_name_the_fault(weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "net"
    assert "nowhere" in refused(tmp_path / "nowhere", output)
    assert "--config" in refused(weights, output)
    assert "stem.0.weight" in refused(weights, output, *OPTIONS, "--model.width", "16")
    assert str(tmp_path) in refused(tmp_path, output)
    (tmp_path / "file").touch()
    assert "cannot write" in refused(weights, tmp_path / "file" / "net", *OPTIONS)
    assert "is a file of weights" in refused(weights, output, "--precise_bn_steps", 3, *OPTIONS)
    assert "a positive number or 0, not '-1'" in refused(weights, output, "--precise_bn_steps", -1, *OPTIONS)
    assert not output.exists()


def test_sizes_that_the_network_cannot_have(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(create_model(ModelConfig(name="binarynet", num_classes=10)).state_dict(), path)
    options = ["--config", "fashion_quickstart", "--model.name", "binarynet", "--model.width", "None"]
    message = refused(path, tmp_path / "net", "--image_size", "40", *options)
    assert "binarynet" in message
    assert "40" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(weights: Path, tmp_path: Path, value: float) -> None:
    state = safetensors.torch.load_file(weights)
    state["head.bias"][0] = value
    safetensors.torch.save_file(state, weights)
    assert "head.bias" in refused(weights, tmp_path / "net", *OPTIONS)


def test_a_network_that_predicts_zeros(weights: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(weights)
    state |= {name: torch.zeros_like(state[name]) for name in ("head.weight", "head.bias")}
    safetensors.torch.save_file(state, weights)
    assert "its logits are all 0; train it" in refused(weights, tmp_path / "net", *OPTIONS)


def test_a_network_without_an_update(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(create_model(dataclasses.replace(NETWORK, initial_weights="real")).state_dict(), path)
    assert "train at least one step" in refused(path, tmp_path / "net", *OPTIONS)
