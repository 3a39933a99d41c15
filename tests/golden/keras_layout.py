"""Variables and images recorded from Keras, and the files in which Keras keeps them."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from tests.golden import recipe

FOLDER = Path(__file__).parent
Variables = Mapping[str, Mapping[str, np.ndarray]]


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


@functools.cache
def variables(name: str) -> Variables:
    """The recorded variables of each layer of a model, "kernel:0" and so on, in the order of Keras'
    `model.layers`."""
    graph, _ = load_model(name)
    found: dict[str, dict[str, np.ndarray]] = {}
    for layer in graph["layers"]:
        found[layer["name"]] = {}
        for variable in layer["vars"]:
            kind = variable["kind"]
            array = recipe.model_var(
                graph["weights"],
                variable["key"],
                tuple(variable["shape"]),
                tuple(kind) if isinstance(kind, list) else kind,
                variable.get("fan_in"),
            )
            assert recipe.sha(array).startswith(variable["sha"]), variable["key"]
            found[layer["name"]][variable["key"].rsplit("/", 1)[-1] + ":0"] = array
    return found


def flat(layers: Variables) -> dict[str, np.ndarray]:
    """Variables under their full names, "conv2d/kernel:0"."""
    return {f"{layer}/{name}": array for layer, found in layers.items() for name, array in found.items()}


def write_npz(path: Path, layers: Variables) -> None:
    """As `np.savez(path, **{v.name: v.numpy() for v in model.weights})`."""
    np.savez(path, **flat(layers))  # type: ignore[arg-type]


def write_arrays(path: Path, layers: Variables) -> None:
    """As `np.savez(path, *model.get_weights())`."""
    np.savez(path, *flat(layers).values())


def write_h5(path: Path, layers: Variables, group: str = "/", chunks: int = 1) -> None:
    """As Keras 2's `model.save_weights`, or under "model_weights" as `model.save`.

    `chunks` above 1 splits the list of layers as Keras does where it is too long for one attribute.
    """
    with h5py.File(path, "w") as file:
        root = file.require_group(group)
        names = np.array_split([name.encode() for name in layers], chunks)
        for index, part in enumerate(names):
            root.attrs["layer_names" if chunks == 1 else f"layer_names{index}"] = part
        for layer, found in layers.items():
            root.create_group(layer).attrs["weight_names"] = [f"{layer}/{name}".encode() for name in found]
            for name, array in found.items():
                root[layer][f"{layer}/{name}"] = array
