"""Packed activations: the same bits as a plain float implementation, in less memory."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitfleet.models import (
    BiRealNet,
    QuantConv2d,
    XNORNet,
    approx_sign,
    birealnet_small,
    quicknet,
    reactnet_small,
    ste_sign,
    wide_ste_sign,
)
from bitfleet.models.layers.real_layers import NO_PADDING, conv2d


class NaiveSteSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, grad, 0.0)


class NaiveWideSign(NaiveSteSign):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1.25, grad, 0.0)


class NaiveApproxSign(NaiveSteSign):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, (1 - x.abs()) * 2 * grad, 0.0)


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
NAIVE: dict[Any, Callable[[Tensor], Tensor]] = {
    ste_sign: NaiveSteSign.apply,
    wide_ste_sign: NaiveWideSign.apply,
    approx_sign: NaiveApproxSign.apply,
}


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def make_naive(model: nn.Module) -> None:
    """Replace the quantizers of `model` by plain ones, behind which every convolution is
    torch's."""
    for module in model.modules():
        if isinstance(module, QuantConv2d):
            module.input_quantizer = NAIVE[module.input_quantizer]


def gradients(model: nn.Module, images: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Logits, gradients and running statistics after one forward and backward pass."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    F.cross_entropy(logits.float(), torch.arange(len(images))).backward()
    assert images.grad is not None
    found = {"logits": logits.detach(), "images": images.grad}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found | dict(model.named_buffers())


class SteNet(nn.Sequential):
    """Both paddings, both strides and a pool behind `ste_sign`."""

    def __init__(self) -> None:
        super().__init__(
            QuantConv2d(3, 8, 3, 2, input_quantizer=ste_sign),
            nn.BatchNorm2d(8),
            QuantConv2d(8, 16, 5, input_quantizer=ste_sign),
            nn.MaxPool2d(2),
            QuantConv2d(16, 10, 3, padding="valid", input_quantizer=ste_sign),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def small_quicknet() -> nn.Module:
    return quicknet(width=8, depths=(1, 2), num_classes=10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make_model", [birealnet_small, SteNet, small_quicknet, reactnet_small])
def test_packed_equals_naive_bit_for_bit(
    make_model: Callable[[], nn.Module],
    autocast: bool,
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    packed, naive = make_model(), make_model()
    naive.load_state_dict(packed.state_dict())
    images = torch.randn(4, 3, 30, 30).to(memory_format=memory_format)
    found = gradients(packed, images, autocast)
    make_naive(naive)
    expected = gradients(naive, images, autocast)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert value.stride() == expected[name].stride(), name
        assert torch.equal(value, expected[name]), name


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for backward, besides parameters and the input; shared
    storages count once."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad  # the graph, and with it what it saved, is alive until here: no address is used twice
    return sum(storages.values())


def packed_weight_bytes(layer: QuantConv2d) -> int:
    assert layer.in_channels % 64 == layer.out_channels % 8 == 0
    return layer.weight.numel() // 8


@needs_compiler
@pytest.mark.parametrize("quantizer", [ste_sign, approx_sign], ids=["ste", "approx"])
def test_bytes_saved_by_a_layer(quantizer: Any) -> None:
    layer = QuantConv2d(64, 8, 3, input_quantizer=quantizer)
    x = channels_last(torch.randn(4, 64, 12, 12)).requires_grad_()
    signs = 4 * 64 * 14 * 14 // 8  # with their padding
    kept = x.numel() // 8 if quantizer is ste_sign else 4 * x.numel()
    assert saved_bytes(layer, x) == signs + kept + packed_weight_bytes(layer)
    make_naive(layer)
    assert saved_bytes(layer, x) == (4 + 4) * x.numel()


@needs_compiler
def test_bytes_saved_by_a_network() -> None:
    model = BiRealNet(width=64, depths=(4, 4))
    x = channels_last(torch.randn(2, 3, 64, 64))
    # The binary convolutions see 64 channels of 16x16 five times and 128 channels of 8x8 three
    # times an image; the strided one keeps the row and column that it pads, in either case.
    floats = 2 * (64 * (4 * 16 * 16 + 17 * 17) + 128 * 3 * 8 * 8)
    bits = 2 * (64 * (4 * 18 * 18 + 17 * 17) + 128 * 3 * 10 * 10)
    weights = sum(packed_weight_bytes(m) for m in model.modules() if isinstance(m, QuantConv2d))
    packed = saved_bytes(model, x)
    make_naive(model)
    assert saved_bytes(model, x) - packed == 4 * floats - bits // 8 - weights


@needs_compiler
def test_frozen_weight() -> None:
    layer = QuantConv2d(16, 8, 3, 2, input_quantizer=ste_sign).requires_grad_(False)
    x = channels_last(torch.randn(4, 16, 12, 12)).requires_grad_()
    layer(x).sum().backward()
    expected = torch.zeros_like(x).requires_grad_()
    conv2d(F.pad(expected, (0, 1, 0, 1)), layer.weight, 2, NO_PADDING).sum().backward()
    assert x.grad is not None
    assert expected.grad is not None
    assert torch.equal(x.grad, expected.grad * (x.abs() <= 1))
    assert layer.weight.grad is None


def test_checkpointing_still_works() -> None:
    layer = QuantConv2d(4, 4, 3, 2, input_quantizer=approx_sign)
    x = channels_last(torch.randn(2, 4, 9, 9)).requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [birealnet_small, XNORNet])
def test_compiled_equals_eager(model_class: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = model_class()
    side = 224 if isinstance(model, XNORNet) else 32
    images = torch.randn(2, 3, side, side).to(memory_format=torch.channels_last)
    layer = next(module for module in model.modules() if isinstance(module, QuantConv2d))
    model.eval()  # no batch statistics: rounding differences stay small and few signs turn
    logits = model(images)
    logits.sum().backward()
    expected = layer.weight.grad
    assert expected is not None
    layer.weight.grad = None
    compiled = torch.compile(model)(images)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, logits, rtol=1e-2, atol=1e-2)
    assert layer.weight.grad is not None
    assert float(F.cosine_similarity(layer.weight.grad.flatten(), expected.flatten(), dim=0)) > 0.99
