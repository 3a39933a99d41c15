"""Weights, images and layers recorded from Keras, in PyTorch's layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfleet.models import BatchNorm
from tests.golden import recipe

FOLDER = Path(__file__).parent


def load_model(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The recorded graph (JSON) and the recorded outputs of a model."""
    graph: dict[str, Any] = json.loads((FOLDER / f"model_{name}.json").read_text())
    with np.load(FOLDER / f"model_{name}.npz") as outputs:
        return graph, dict(outputs)


def images(graph: dict[str, Any]) -> Tensor:
    """The images that went in, float32 [N, C, H, W]."""
    shape = tuple(graph["input_shape"])
    batch = np.stack([recipe.image(f"{graph['name']}/{seed}", shape) for seed in graph["image_seeds"]])
    assert recipe.sha(batch) == graph["sha_images"]
    return nchw(batch)


def nchw(array: np.ndarray) -> Tensor:
    """NHWC -> NCHW."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def kernel(array: np.ndarray) -> Tensor:
    """HWIO -> OIHW, dense (in, out) -> (out, in)."""
    order = (3, 2, 0, 1) if array.ndim == 4 else (1, 0)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(order)))


def load_weights(model: nn.Module, graph: dict[str, Any]) -> None:
    """Fill `model` with the recorded variables; layers of a class correspond in the order of their Keras numbers."""
    for keras_class, module_class in (
        ("Conv2D", nn.Conv2d),
        ("QuantConv2D", nn.Conv2d),
        ("BatchNormalization", BatchNorm),
        ("QuantDense", nn.Linear),
        ("Dense", nn.Linear),
    ):
        layers = sorted((layer for layer in graph["layers"] if layer["cls"] == keras_class), key=_number)
        quantized = keras_class.startswith("Quant")
        modules = [
            module
            for module in model.modules()
            if isinstance(module, module_class) and hasattr(module, "input_quantizer") == quantized
        ]
        for layer, module in zip(layers, modules, strict=True):
            _load_layer(module, layer, graph["weights"], graph)


def _number(layer: dict[str, Any]) -> int:
    suffix = layer["name"].rsplit("_", 1)[-1]
    return int(suffix) if suffix.isdigit() else 0


def _load_layer(module: nn.Module, layer: dict[str, Any], weights: str, graph: dict[str, Any]) -> None:
    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    for variable in layer["vars"]:
        kind = variable["kind"]
        array = recipe.model_var(
            weights,
            variable["key"],
            tuple(variable["shape"]),
            tuple(kind) if isinstance(kind, list) else kind,
            variable.get("fan_in"),
        )
        assert recipe.sha(array).startswith(variable["sha"]), variable["key"]
        name = variable["key"].rsplit("/", 1)[-1]
        if name == "kernel":
            value = _nchw_rows(array, layer, graph) if array.ndim == 2 else kernel(array)
        else:
            value = torch.from_numpy(array)
        target = getattr(module, names.get(name, "weight" if name == "kernel" else name))
        with torch.no_grad():
            assert target.shape == value.shape, variable["key"]
            target.copy_(value)


def _nchw_rows(array: np.ndarray, layer: dict[str, Any], graph: dict[str, Any]) -> Tensor:
    """Dense kernel after a Flatten: Keras flattens H, W, C and PyTorch C, H, W."""
    by_name = {other["name"]: other for other in graph["layers"]}
    source = by_name[layer["inbound"][0]]
    if source["cls"] != "Flatten":
        return kernel(array)
    _, height, width, channels = by_name[source["inbound"][0]]["output_shape"]
    rows = array.reshape(height, width, channels, -1).transpose(2, 0, 1, 3).reshape(array.shape)
    return kernel(np.ascontiguousarray(rows))
