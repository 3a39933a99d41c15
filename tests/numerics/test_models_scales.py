"""Scales of larq-zoo's kernels: folded into the BatchNorm, they give the logits of a network that
multiplies by them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitfleet.models import BatchNorm, BinaryNet, BiRealNet, QuantConv2d, XNORNet, load_keras_weights, ste_sign
from tests.golden.keras_layout import Variables, variables, write_npz


def with_scales(layers: Variables) -> tuple[Variables, list[np.ndarray]]:
    """Latent kernels in place of the signs, and mean|W| of each layer's filters."""
    generator = np.random.default_rng(0)
    result: dict[str, dict[str, np.ndarray]] = {}
    scales = []
    for layer, found in layers.items():
        result[layer] = dict(found)
        if layer.startswith("quant"):
            signs = found["kernel:0"]
            latent = signs * generator.random(signs.shape, np.float32) * generator.uniform(0.05, 1, signs.shape[-1])
            result[layer]["kernel:0"] = latent
            axes = tuple(range(signs.ndim - 1))
            scales.append(np.abs(latent).mean(axes))
    return result, scales


def logits_of_scaled_products(model: nn.Module, scales: list[np.ndarray], images: Tensor) -> Tensor:
    """Logits of `model` with the output of each binary layer times its scales."""
    remaining = [torch.from_numpy(values) for values in scales]

    def multiply(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        values = remaining.pop(0)
        return output * (values[:, None, None] if output.dim() == 4 else values)

    hooks = [m.register_forward_hook(multiply) for m in model.modules() if hasattr(m, "input_quantizer")]
    with torch.no_grad():
        logits: Tensor = model(images)
    for hook in hooks:
        hook.remove()
    assert not remaining
    return logits


def check(model: nn.Module, layers: Variables, side: int, path: Path) -> None:
    # In double precision: in single, one activation that rounds to the other side of 0 moves the
    # logits.
    model.double().eval()
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latent, scales = with_scales(layers)
    write_npz(path, latent)
    load_keras_weights(model, path)
    expected = logits_of_scaled_products(model, scales, images)
    with torch.no_grad():
        unscaled = model(images)
        load_keras_weights(model, path, scales="larq-zoo")
        logits = model(images)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8)
    assert (unscaled - expected).abs().max() > 0.1


def test_birealnet(tmp_path: Path) -> None:
    check(BiRealNet(), variables("off_birealnet_bn_64"), 64, tmp_path / "weights.npz")


def test_binarynet_whose_norms_have_no_factor(tmp_path: Path) -> None:
    check(BinaryNet(), variables("off_binarynet_bn"), 32, tmp_path / "weights.npz")


@pytest.mark.parametrize("gamma", [True, False], ids=["gamma", "no_gamma"])
def test_xnornet(gamma: bool, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = XNORNet(num_classes=10)
    # 64 filters for 4096: the same layers in a fraction of the time
    model.classifier[1] = QuantConv2d(256, 64, 6, padding="valid", input_quantizer=ste_sign)
    model.classifier[2] = BatchNorm(64, momentum=0.9, eps=1e-4)
    model.classifier[3] = QuantConv2d(64, 64, 1, padding="valid", input_quantizer=ste_sign)
    model.classifier[4] = BatchNorm(64, momentum=0.9, eps=1e-3)
    model.classifier[7] = nn.Linear(64, 10, bias=False)
    check(model.to_empty(device="cpu"), xnornet_variables(gamma), 224, tmp_path / "weights.npz")


def xnornet_variables(gamma: bool) -> Variables:
    """Random variables; larq-zoo's XNOR-Net has no gamma."""
    generator = np.random.default_rng(1)
    layers = {"conv2d": {"kernel:0": generator.normal(0, 0.05, (11, 11, 3, 96))}}
    shapes = [(5, 5, 96, 256), (3, 3, 256, 384), (3, 3, 384, 384), (3, 3, 384, 256), (6, 6, 256, 64), (1, 1, 64, 64)]
    for number, shape in enumerate(shapes):
        layers[keras_name("quant_conv2d", number)] = {"kernel:0": generator.choice([-1.0, 1.0], shape)}
    # of the real convolution, in front of the first sign, and behind each binary convolution
    inputs = [(1, 96), (1, 96), *((height * width * channels, filters) for height, width, channels, filters in shapes)]
    for number, (fan_in, channels) in enumerate(inputs):
        norm = {
            "gamma:0": generator.uniform(0.5, 1.5, channels),
            "beta:0": generator.uniform(-0.3, 0.3, channels),
            "moving_mean:0": generator.uniform(-0.5, 0.5, channels) * fan_in**0.5,
            "moving_variance:0": generator.uniform(0.5, 1.5, channels) * fan_in,
        }
        layers[keras_name("batch_normalization", number)] = {
            name: array for name, array in norm.items() if gamma or name != "gamma:0"
        }
    return layers | {"dense": {"kernel:0": generator.normal(0, 0.5, (64, 10))}}


def keras_name(kind: str, number: int) -> str:
    return f"{kind}_{number}" if number else kind
