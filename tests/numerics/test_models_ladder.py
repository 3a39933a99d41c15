"""ReActNets and QuickNets against numbers recorded from their published code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitfleet.models import ModelConfig, QuantConv2d, count, load_keras_weights
from bitfleet.models.layers import layers
from bitfleet.models.official_weights import _blocks, _renamed, from_official
from bitfleet.trainer.checkpoint.initial_weights import load_initial_weights
from tests.golden import ladder, ladder_recipe
from tests.golden.keras_layout import Variables, write_arrays, write_h5, write_npz

WRITERS: dict[str, Callable[[Path, Variables], None]] = {
    "arrays.npz": write_arrays,
    "named.npz": write_npz,
    "weights.h5": write_h5,
}


def published(name: str, folder: Path) -> nn.Module:
    """The network with the recorded weights, from a file as its authors wrote it."""
    case = ladder.load(name)
    net = case.info["net"]
    model = timm.create_model(net).eval()
    if case.info["layout"] == "keras":
        write_arrays(path := folder / "w.npz", ladder.keras_layers(case))
    else:
        state = {f"module.{key}": tensor for key, tensor in ladder.tensors(case).items()}
        for key in [key for key in state if key.endswith("running_mean")]:
            state[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
        torch.save({"epoch": 3, "state_dict": state, "best_top1_acc": 0.1}, path := folder / "model_best.pth.tar")
    load_initial_weights(model, ModelConfig(name=net), path, "none", new_head=False)
    return model


def run(model: nn.Module, images: Tensor) -> tuple[np.ndarray, list[list[int]]]:
    """Logits, and the number of inputs >= 0 of each sign layer and image."""
    num_positive: list[list[int]] = []
    for module in model.modules():
        if isinstance(module, QuantConv2d):
            module.register_forward_pre_hook(
                lambda _, inputs: num_positive.append((inputs[0] >= 0).flatten(1).sum(1).tolist())
            )
    with torch.no_grad():
        return model(images).numpy(), num_positive


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "floats"])
@pytest.mark.parametrize("name", ["reactnet18_64", "reactnet_a_64", "quicknet_small_64"])
def test_logits_and_signs_match_the_published_code(
    name: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(layers, "can_pack", lambda *_: False)
    case = ladder.load(name)
    logits, num_positive = run(published(name, tmp_path), case.images)
    for layer, counted, recorded in zip(
        case.info["sign_layers"], num_positive, case.outputs["n_positive"], strict=True
    ):
        assert counted == recorded.tolist(), layer
    np.testing.assert_allclose(logits, case.outputs["logits64"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["reactnet18_64", "reactnet_a_64", "quicknet_small_64"])
def test_sizes_match_the_published_code(name: str) -> None:
    info = ladder.load(name).info
    with torch.device("meta"):
        size = count(timm.create_model(info["net"]), (3, 224, 224))
    recorded = info["counts"]
    assert size.num_parameters == recorded["trainable"]
    assert size.num_binary_parameters == recorded["binary"]
    assert size.num_macs_1bit == recorded["macs_1bit"]
    assert size.num_macs_32bit == recorded["macs_32bit"]
    num_fixed = sum(int(np.prod(var["shape"])) for var in info["vars"] if var["kind"] == ["blur3"])
    assert size.num_running_statistics == recorded["non_trainable"] - num_fixed


@pytest.mark.parametrize("file", WRITERS)
def test_files_of_keras_hold_the_same_network(file: str, tmp_path: Path) -> None:
    case = ladder.load("quicknet_small_64")
    expected, model = published("quicknet_small_64", tmp_path), timm.create_model("quicknet_small")
    WRITERS[file](tmp_path / file, ladder.keras_layers(case))
    load_keras_weights(model, tmp_path / file)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_gradients_of_a_training_step_match_the_published_code() -> None:
    case = ladder.load("reactnet18_train")
    official = ladder.tensors(case)
    model = timm.create_model("reactnet18")
    missing = model.load_state_dict(from_official(model, official), strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing)
    logits = model(case.images)
    loss = F.cross_entropy(logits, torch.tensor(case.info["labels"]))
    loss.backward()

    np.testing.assert_allclose(logits.detach().numpy(), case.outputs["logits64"], rtol=0, atol=1e-4)
    assert loss.item() == pytest.approx(case.info["loss_ce"], rel=2e-5)
    ours: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
    blocks = _blocks(official)
    for name, tensor in official.items():
        layer, _, variable = name.rpartition(".")
        value = ours[f"{_renamed(layer, blocks)}.{variable}"]
        kernel = official.get(f"{layer.removesuffix('bn1')}binary_conv.weight")
        # Ours see the sum of signs, theirs the sum times the mean of |W|.
        scale = torch.ones(1) if kernel is None else kernel.abs().mean((1, 2, 3))
        if variable.startswith("running"):
            check_statistics(name, value * scale ** (2 if variable == "running_var" else 1), case)
            continue
        grad = value.grad.reshape(tensor.shape)
        if layer.endswith("binary_conv"):
            grad = grad / tensor.abs().mean((1, 2, 3), keepdim=True) * (tensor.abs() < 1)
        check_gradient(name, grad.double().flatten().numpy(), case)


def check_statistics(name: str, found: Tensor, case: ladder.Case) -> None:
    recorded = case.outputs[f"bn|{name}"]
    assert np.abs(found.numpy() - recorded).max() <= 1e-4 * np.abs(recorded).max(), name


def check_gradient(name: str, found: np.ndarray, case: ladder.Case) -> None:
    norm, _, dot = case.info["grad_ce"][name]
    part = case.outputs[f"grad_ce|{name}"].astype(np.float64)
    distance = np.linalg.norm(found[: part.size] - part)
    assert distance <= 1e-3 * max(np.linalg.norm(part), 1e-3 * norm), name
    assert np.linalg.norm(found) == pytest.approx(norm, rel=1e-3), name
    assert abs(found @ ladder_recipe.projection(name, found.size) - dot) <= 5e-3 * norm, name
