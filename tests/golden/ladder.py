"""Networks of ReActNet and larq-zoo recorded from their published code.

Sources: github.com/liuzechun/ReActNet at a6cd08d (stage 2) and larq-zoo 2.4.0 with TensorFlow
2.15.1 and larq 0.14.0, on a CPU. A network is run once on 64x64 images; of the gradients of one
training step of ReActNet-18 there are the first 64 elements, the norm, the sum and a projection.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.golden import ladder_recipe as recipe

FOLDER = Path(__file__).parent


class Case(NamedTuple):
    """A recorded network with its inputs and outputs."""

    info: dict[str, Any]
    weights: dict[str, np.ndarray]
    """Under the published names, in the order and layout of the published code."""
    images: Tensor
    """float32 [N, 3, 64, 64], channels_last."""
    outputs: dict[str, np.ndarray]


@functools.cache
def load(name: str) -> Case:
    """Read a case and make its inputs."""
    info: dict[str, Any] = json.loads((FOLDER / f"ladder_{name}.json").read_text())
    images = recipe.images(info["case"], info["size"], info["seeds"])
    assert recipe.sha(images) == info["sha_images"]
    with np.load(FOLDER / f"ladder_{name}.npz") as outputs:
        return Case(info, recipe.weights(info), torch.from_numpy(images).permute(0, 3, 1, 2), dict(outputs))


def keras_layers(case: Case) -> dict[str, dict[str, np.ndarray]]:
    """The weights of each layer as `tests.golden.keras_layout` writes them."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in case.weights.items():
        layer, _, variable = name.rpartition("/")
        found.setdefault(layer, {})[f"{variable}:0"] = array
    return found


def tensors(case: Case) -> dict[str, Tensor]:
    """The weights of a PyTorch network."""
    return {name: torch.from_numpy(array) for name, array in case.weights.items()}
