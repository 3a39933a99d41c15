"""Files of larq-zoo's other networks: every variable goes where the published layer is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from bitfleet.models import kernel_from_keras, load_keras_weights
from bitfleet.models.keras.weights import _layers
from tests.golden.keras_layout import write_arrays, write_h5

Layers = dict[str, dict[str, np.ndarray]]
GENERATOR = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return GENERATOR.uniform(0.1, 1, shape).astype(np.float32) * GENERATOR.choice([-1, 1], shape).astype(np.float32)


def norm(channels: int, names: str = "gamma beta moving_mean moving_variance") -> dict[str, np.ndarray]:
    return {f"{name}:0": np.abs(draw(channels)) for name in names.split()}


def kernel(*shape: int) -> dict[str, np.ndarray]:
    return {"kernel:0": draw(*shape)}


def real_to_binary() -> Layers:
    """Width 8, depths (2, 2), 5 classes; the layers by depth in the graph, as Keras lists them."""
    layers: Layers = {
        "r2b_bnn_block_1_conv2d": kernel(7, 7, 3, 8),
        "r2b_bnn_block_1_batch_norm": norm(8),
        "r2b_bnn_block_1_prelu": {"alpha:0": draw(1, 1, 8)},
    }
    for block, inputs, outputs in (("2a", 8, 8), ("2b", 8, 8), ("3a", 8, 16), ("3b", 16, 16)):
        name = f"r2b_bnn_block_{block}"
        layers |= {
            f"{name}_batch_norm": norm(inputs),
            f"{name}_scaling_dense_reduce": kernel(inputs, inputs // 8),
            f"{name}_scaling_dense_expand": kernel(inputs // 8, outputs),
            f"{name}_conv2d": kernel(3, 3, inputs, outputs),
        }
        if inputs != outputs:
            layers[f"{name}_shortcut_conv2d"] = kernel(1, 1, inputs, outputs)
        layers[f"{name}_prelu"] = {"alpha:0": draw(1, 1, outputs)}
        if inputs != outputs:
            layers[f"{name}_shortcut_batch_norm"] = norm(outputs)
    return layers | {"r2b_bnn_block_4_logits": kernel(16, 5) | {"bias:0": draw(5)}}


R2B_MODULES = {
    "r2b_bnn_block_1_conv2d": "stem.0",
    "r2b_bnn_block_1_batch_norm": "stem.1",
    "r2b_bnn_block_1_prelu": "stem.2",
    "r2b_bnn_block_2b_batch_norm": "blocks.1.norm",
    "r2b_bnn_block_2b_scaling_dense_reduce": "blocks.1.factors.reduce",
    "r2b_bnn_block_3a_scaling_dense_expand": "blocks.2.factors.expand",
    "r2b_bnn_block_3a_conv2d": "blocks.2.conv",
    "r2b_bnn_block_3a_prelu": "blocks.2.activation",
    "r2b_bnn_block_3a_shortcut_conv2d": "blocks.2.shortcut.1",
    "r2b_bnn_block_3a_shortcut_batch_norm": "blocks.2.shortcut.2",
    "r2b_bnn_block_4_logits": "head",
}


def resnet_e() -> Layers:
    """Width 4, depths (1, 1), 5 classes."""
    return {
        "conv2d": kernel(7, 7, 3, 4),
        "batch_normalization": norm(4),
        "batch_normalization_1": norm(4),
        "quant_conv2d": kernel(3, 3, 4, 4),
        "batch_normalization_2": norm(4),
        "quant_conv2d_1": kernel(3, 3, 4, 8),
        "conv2d_1": kernel(1, 1, 4, 8),
        "batch_normalization_4": norm(8),
        "batch_normalization_3": norm(8),
        "dense": kernel(8, 5) | {"bias:0": draw(5)},
    }


RESNET_E_MODULES = {
    "conv2d": "stem.0",
    "batch_normalization": "stem.1",
    "batch_normalization_1": "stem.4",
    "quant_conv2d_1": "blocks.1.conv",
    "conv2d_1": "blocks.1.shortcut.1",
    "batch_normalization_3": "blocks.1.shortcut.2",
    "batch_normalization_4": "blocks.1.norm",
    "dense": "head",
}


def quicknet() -> Layers:
    """Width 4, depths (1, 1), 5 classes."""
    return {
        "quant_conv2d": kernel(3, 3, 3, 1),
        "batch_normalization": norm(1),
        "quant_depthwise_conv2d": {"depthwise_kernel:0": draw(3, 3, 1, 1)},
        "batch_normalization_1": norm(1, "moving_mean moving_variance"),
        "quant_conv2d_1": kernel(1, 1, 1, 4),
        "batch_normalization_2": norm(4),
        "quant_conv2d_2": kernel(3, 3, 4, 4),
        "batch_normalization_3": norm(4),
        "depthwise_conv2d": {
            "depthwise_kernel:0": np.repeat(np.outer([1, 2, 1], [1, 2, 1])[:, :, None, None] / 16, 4, axis=2)
        },
        "quant_conv2d_3": kernel(1, 1, 4, 8),
        "batch_normalization_4": norm(8),
        "quant_conv2d_4": kernel(3, 3, 8, 8),
        "batch_normalization_5": norm(8),
        "quant_dense": kernel(8, 5) | {"bias:0": draw(5)},
    }


QUICKNET_MODULES = {
    "quant_conv2d": "stem.0",
    "batch_normalization_1": "stem.4",
    "quant_conv2d_2": "blocks.0.conv",
    "quant_conv2d_3": "blocks.1.3",
    "quant_conv2d_4": "blocks.2.conv",
    "quant_dense": "head",
}
NETWORKS = [
    ("real_to_binary", {"width": 8, "depths": (2, 2)}, real_to_binary, R2B_MODULES),
    ("binary_resnet_e18", {"width": 4, "depths": (1, 1)}, resnet_e, RESNET_E_MODULES),
    ("quicknet_small", {"width": 4, "depths": (1, 1)}, quicknet, QUICKNET_MODULES),
]


def check(model: nn.Module, layers: Layers, modules: dict[str, str]) -> None:
    for layer, name in modules.items():
        module, found = model.get_submodule(name), layers[layer]
        if "kernel:0" in found:
            weight = kernel_from_keras(found["kernel:0"])
            if getattr(module.weight, "binary", False):
                weight = weight.sign()
            assert torch.equal(module.weight, weight), layer
        if "alpha:0" in found:
            assert module.weight.tolist() == found["alpha:0"].flatten().tolist(), layer
        if "moving_mean:0" in found:
            assert module.running_mean.tolist() == found["moving_mean:0"].tolist(), layer
            assert module.running_var.tolist() == found["moving_variance:0"].tolist(), layer
        if "gamma:0" in found:
            assert module.weight.tolist() == found["gamma:0"].tolist(), layer


@pytest.mark.parametrize(("name", "options", "make", "modules"), NETWORKS, ids=[network[0] for network in NETWORKS])
def test_by_name_and_by_order(
    name: str, options: dict[str, Any], make: Callable[[], Layers], modules: dict[str, str], tmp_path: Path
) -> None:
    layers = make()
    for file, write in (("weights.h5", write_h5), ("arrays.npz", write_arrays)):
        model = timm.create_model(name, num_classes=5, **options)
        write(tmp_path / file, layers)
        load_keras_weights(model, tmp_path / file)
        check(model, layers, modules)


def test_a_depthwise_kernel_keeps_its_channels(tmp_path: Path) -> None:
    layers = quicknet() | {
        "quant_conv2d": kernel(3, 3, 3, 2),
        "batch_normalization": norm(2),
        "quant_depthwise_conv2d": {"depthwise_kernel:0": (filters := draw(3, 3, 2, 1))},
        "batch_normalization_1": norm(2, "moving_mean moving_variance"),
        "quant_conv2d_1": kernel(1, 1, 2, 8),
        "batch_normalization_2": norm(8),
        "quant_dense": kernel(8, 5) | {"bias:0": draw(5)},
    }
    for layer in list(layers)[6:-1]:
        del layers[layer]
    layers |= {"quant_conv2d_2": kernel(3, 3, 8, 8), "batch_normalization_3": norm(8)}
    model = timm.create_model("quicknet_small", width=8, depths=(1,), num_classes=5)
    write_h5(tmp_path / "w.h5", layers)
    load_keras_weights(model, tmp_path / "w.h5")
    for channel in range(2):
        assert model.stem[3].weight[channel, 0].tolist() == filters[:, :, channel, 0].tolist()


def test_another_blur_is_refused(tmp_path: Path) -> None:
    layers = quicknet()
    layers["depthwise_conv2d"]["depthwise_kernel:0"][0, 0, 2] = 0.5
    write_h5(tmp_path / "w.h5", layers)
    model = timm.create_model("quicknet_small", width=4, depths=(1, 1), num_classes=5)
    before = model.get_parameter("head.weight").detach().clone()
    with pytest.raises(ValueError, match=r"another filter .*depthwise_conv2d/depthwise_kernel"):
        load_keras_weights(model, tmp_path / "w.h5")
    assert torch.equal(model.get_parameter("head.weight"), before)


def test_a_flattened_image_is_reordered() -> None:
    """Only the first dense layer sees one: 6x6 pixels."""
    with torch.device("meta"):
        layers = _layers(timm.create_model("binary_alexnet"))
    assert [layer.num_pixels for layer in layers if layer.kind == "quant_dense"] == [36, 1, 1]
    assert next(layer.shape("kernel") for layer in layers if layer.kind == "quant_dense") == (9216, 4096)
    assert all("gamma" not in layer.variables for layer in layers)
