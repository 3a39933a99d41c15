"""Single operations against values recorded from TensorFlow and larq."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitfleet.models import (
    BatchNorm,
    ChannelLayerNorm,
    QuantConv2d,
    SameAvgPool2d,
    SameConv2d,
    SameMaxPool2d,
    approx_sign,
    kernel_from_keras,
    ste_sign,
)
from bitfleet.models.layers.real_layers import NO_PADDING, conv2d
from tests.golden.keras_layout import nchw

FIXTURES = dict(np.load(Path(__file__).parents[1] / "golden" / "fixtures.npz"))
QUANTIZERS = {"ste_sign": ste_sign, "approx_sign": approx_sign}


def parse(name: str) -> tuple[int, int, bool, Tensor, Tensor]:
    """Kernel size, stride, whether SAME, input and output of a fixture called
    <operation>_k3_s2_same_x13."""
    match = re.fullmatch(r"\w+_k(\d+)_s(\d+)_(same|valid)_(x\d+)", name)
    assert match
    return int(match[1]), int(match[2]), match[3] == "same", nchw(FIXTURES[match[4]]), nchw(FIXTURES[name])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FIXTURES if name.startswith("conv_")])
def test_convolution(name: str) -> None:
    kernel_size, stride, same, x, expected = parse(name)
    weight = kernel_from_keras(FIXTURES[f"w{kernel_size}"])
    if not same:
        assert_close(conv2d(x, weight, stride, NO_PADDING), expected)
        return
    layer = SameConv2d(3, 4, kernel_size, stride)
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("name", [name for name in FIXTURES if name.startswith("qconv_")])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_binary_convolution(name: str, grad_enabled: bool) -> None:
    kernel_size, stride, same, x, expected = parse(name)
    layer = QuantConv2d(3, 4, kernel_size, stride, padding="same" if same else "valid", input_quantizer=ste_sign)
    with torch.no_grad():
        layer.weight.copy_(kernel_from_keras(FIXTURES[f"w{kernel_size}"]))
    with torch.set_grad_enabled(grad_enabled):
        assert_close(layer(x), expected)


@pytest.mark.parametrize("name", [name for name in FIXTURES if "pool_" in name])
def test_pool(name: str) -> None:
    kernel_size, stride, same, x, expected = parse(name)
    pool: nn.Module = nn.MaxPool2d(kernel_size, stride)
    if same:
        pool = (SameMaxPool2d if name.startswith("max") else SameAvgPool2d)(kernel_size, stride)
    assert_close(pool(x), expected)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer_is_exact(name: str) -> None:
    x = torch.from_numpy(FIXTURES["q_x"]).requires_grad_()
    result = QUANTIZERS[name](x)
    result.sum().backward()
    assert x.grad is not None
    assert torch.equal(result, torch.from_numpy(FIXTURES[f"q_{name}"]))
    assert torch.equal(x.grad, torch.from_numpy(FIXTURES[f"q_{name}_grad"]))
    with torch.no_grad():
        assert torch.equal(QUANTIZERS[name](x), result)


BATCH_NORMS = pytest.mark.parametrize(("momentum", "eps"), [(0.8, 1e-3), (0.9, 1e-4), (0.99, 1e-3)])


@BATCH_NORMS
def test_batch_norm(momentum: float, eps: float) -> None:
    recorded = {key: FIXTURES[f"bn_m{momentum}_e{eps}_{key}"] for key in ("train_y", "eval_y")}
    norm = BatchNorm(3, momentum=momentum, eps=eps)
    set_affine(norm)
    x = nchw(FIXTURES["bn_x"])
    assert_close(norm(x), nchw(recorded["train_y"]))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert_close(norm.running_mean, torch.from_numpy(FIXTURES[f"bn_m{momentum}_e{eps}_moving_mean"]))
    # The biased variance, 1 % smaller here, would fail.
    assert_close(norm.running_var, torch.from_numpy(FIXTURES[f"bn_m{momentum}_e{eps}_moving_var"]))
    assert_close(norm.eval()(x), nchw(recorded["eval_y"]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layer_norm(memory_format: torch.memory_format) -> None:
    norm = ChannelLayerNorm(3)
    set_affine(norm)
    result = norm(nchw(FIXTURES["bn_x"]).to(memory_format=memory_format))
    assert_close(result, nchw(FIXTURES["ln_y"]))


def set_affine(norm: BatchNorm | ChannelLayerNorm) -> None:
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(FIXTURES["bn_gamma"]))
        norm.bias.copy_(torch.from_numpy(FIXTURES["bn_beta"]))


def test_gradients_of_a_strided_binary_convolution() -> None:
    x = nchw(FIXTURES["x12"]).requires_grad_()
    layer = QuantConv2d(3, 4, 3, 2, input_quantizer=approx_sign)
    with torch.no_grad():
        layer.weight.copy_(kernel_from_keras(FIXTURES["w3"]))
    result = layer(x)
    result.backward(nchw(FIXTURES["bconv_up"]))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert_close(result, nchw(FIXTURES["bconv_y"]))
    assert_close(x.grad, nchw(FIXTURES["bconv_grad_x"]))
    assert_close(layer.weight.grad, kernel_from_keras(FIXTURES["bconv_grad_kernel"]))
