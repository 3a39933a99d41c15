"""Whole models against logits recorded from the paper's own code."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitfleet.models import BinaryNet, BiRealNet, count, load_keras_weights
from tests.golden.keras_layout import Variables, images, load_model, variables, write_arrays, write_h5

MODELS = pytest.mark.parametrize(
    ("name", "model_class"), [("off_birealnet_bn_64", BiRealNet), ("off_binarynet_bn", BinaryNet)]
)
WRITERS: dict[str, Callable[[Path, Variables], None]] = {
    "arrays.npz": write_arrays,
    "weights.h5": write_h5,
}


@MODELS
@pytest.mark.parametrize("file", WRITERS)
def test_logits_and_signs_match_the_official_code(
    name: str, model_class: type[nn.Module], file: str, tmp_path: Path
) -> None:
    graph, outputs = load_model(name)
    WRITERS[file](tmp_path / file, variables(name))
    model = model_class().eval()
    load_keras_weights(model, tmp_path / file)
    num_positive: list[Tensor] = []

    def count_positive(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        num_positive.append((inputs[0] >= 0).flatten(1).sum(1))

    for module in model.modules():
        if getattr(module, "input_quantizer", None) is not None:
            module.register_forward_pre_hook(count_positive)
    with torch.no_grad():
        logits = model(images(graph).to(memory_format=torch.channels_last))

    # Of each sign layer, so a failure names the first layer that is wrong.
    for layer, counted, recorded in zip(graph["sign_layers"], num_positive, outputs["n_positive"], strict=True):
        assert counted.tolist() == recorded.tolist(), layer
    np.testing.assert_allclose(logits.numpy(), outputs["logits64"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits.softmax(1).numpy(), outputs["probs"], rtol=0, atol=1e-5)


@MODELS
def test_sizes_match_the_official_code(name: str, model_class: type[nn.Module]) -> None:
    graph, _ = load_model(name)
    with torch.device("meta"):
        model = model_class()
    height, width, channels = graph["input_shape"]
    size = count(model, (channels, height, width))
    recorded = graph["counts"]
    assert size.num_parameters == recorded["trainable"]
    assert size.num_running_statistics == recorded["non_trainable"]
    assert size.num_binary_parameters == recorded["binary"]
    assert size.num_macs_1bit == recorded["macs_1bit"]
    assert size.num_macs_32bit == recorded["macs_32bit"]
    assert sum(getattr(p, "binary", False) for p in model.parameters()) == recorded["binary_tensors"]
