import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitfleet.models import (
    BatchNorm,
    BlurPool2d,
    QuantConv2d,
    QuantLinear,
    RPReLU,
    SameAvgPool2d,
    SameConv2d,
    SameDepthwiseConv2d,
    SameMaxPool2d,
    approx_sign,
    hardtanh_tanh_sign,
    ste_sign,
    wide_ste_sign,
)
from bitfleet.models.layers.layers import random_signs_
from bitfleet.models.layers.real_layers import glorot_normal_, glorot_uniform_, he_normal_, same_padding


def layers() -> list[nn.Module]:
    return [QuantConv2d(3, 4, 3, 2, input_quantizer=approx_sign), QuantLinear(5, 6, input_quantizer=ste_sign)]


@pytest.mark.parametrize("layer", layers(), ids=["conv", "linear"])
class TestBinaryMark:
    def test_new_layer(self, layer: nn.Module) -> None:
        assert [name for name, _ in layer.named_parameters()] == ["weight"]
        assert layer.weight.binary is True
        assert set(layer.weight.unique().tolist()) == {-1.0, 1.0}

    def test_survives_deepcopy_inside_a_model(self, layer: nn.Module) -> None:
        clone = copy.deepcopy(nn.Sequential(layer))
        assert clone[0].weight.binary is True
        assert clone[0].weight is not layer.weight
        assert torch.equal(clone[0].weight, layer.weight)

    def test_survives_pickling(self, layer: nn.Module) -> None:
        assert pickle.loads(pickle.dumps(layer)).weight.binary is True

    def test_survives_conversions(self, layer: nn.Module) -> None:
        clone = copy.deepcopy(layer)
        assert clone.to(torch.bfloat16).weight.binary is True
        assert clone.to("meta").weight.binary is True
        assert clone.to_empty(device="cpu").weight.binary is True

    def test_survives_assigned_state(self, layer: nn.Module) -> None:
        clone = copy.deepcopy(layer)
        clone.load_state_dict({"weight": torch.ones_like(layer.weight)}, assign=True)
        assert clone.weight.binary is True
        assert bool((clone.weight == 1).all())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel_size": (1, 9)}, r"kernel_size is \(1, 9\); expected a whole number from 1 up"),
        ({"kernel_size": 0}, "kernel_size is 0;"),
        ({"kernel_size": 3, "stride": (1, 2)}, r"stride is \(1, 2\);"),
        ({"kernel_size": 3, "stride": 0}, "stride is 0;"),
        ({"kernel_size": 3, "padding": "SAME"}, 'padding is \'SAME\'; expected "same", "valid" or a number of pixels'),
        ({"kernel_size": 3, "padding": -1}, "padding is -1;"),
    ],
    ids=str,
)
def test_options_that_a_convolution_does_not_have(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        QuantConv2d(4, 4, input_quantizer=ste_sign, **options)
    if "padding" not in options:
        with pytest.raises(ValueError, match=sentence):
            SameConv2d(4, 4, **options)


def test_real_layers_are_not_marked() -> None:
    assert not hasattr(SameConv2d(3, 4, 3).weight, "binary")


@pytest.mark.parametrize("initializer", [glorot_uniform_, glorot_normal_])
def test_random_signs_are_fair(initializer) -> None:
    weight = random_signs_(torch.empty(64, 64, 3, 3), initializer)
    assert bool((weight.abs() == 1).all())
    assert abs(float(weight.mean())) < 0.03  # 5 standard deviations


def test_zero_becomes_plus_one() -> None:
    assert bool((random_signs_(torch.empty(4, 4), nn.init.zeros_) == 1).all())


def test_glorot_normal_is_truncated_and_has_keras_variance() -> None:
    weight = glorot_normal_(torch.empty(256, 128, 3, 3))
    variance = 2 / (9 * (256 + 128))
    assert float(weight.var()) == pytest.approx(variance, rel=0.02)
    assert float(weight.abs().max()) <= 2 * variance**0.5 / 0.8796


def padded(x: Tensor, kernel_size: int, stride: int, value: float) -> Tensor:
    return F.pad(x, same_padding(x, kernel_size, stride), value=value)


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
@pytest.mark.parametrize("stride", [2, 3])
def test_same_pools_equal_explicit_padding(kernel_size: int, stride: int) -> None:
    if stride > kernel_size:
        with pytest.raises(ValueError, match="stride is 3"):
            SameMaxPool2d(kernel_size, stride)
        return
    for height, width in ((7, 7), (8, 8), (7, 10), (12, 9), (5, 16)):
        x = torch.randn(2, 3, height, width)
        expected_max = F.max_pool2d(padded(x, kernel_size, stride, -torch.inf), kernel_size, stride)
        assert torch.equal(SameMaxPool2d(kernel_size, stride)(x), expected_max)
        inside = padded(torch.ones_like(x), kernel_size, stride, 0)
        expected_mean = F.avg_pool2d(padded(x, kernel_size, stride, 0), kernel_size, stride) / F.avg_pool2d(
            inside, kernel_size, stride
        )
        torch.testing.assert_close(SameAvgPool2d(kernel_size, stride)(x), expected_mean)


def test_zeros_are_padded_after_the_sign() -> None:
    layer = QuantConv2d(1, 1, 3, input_quantizer=ste_sign)
    with torch.no_grad():
        layer.weight.fill_(1)
    # Every pixel is 0, whose sign is +1: a corner sees four pixels, the rest of its window is
    # padding.
    assert layer(torch.zeros(1, 1, 4, 4))[0, 0, 0, 0] == 4


def test_batch_norm_of_rows_averages_the_biased_variance() -> None:
    norm, x = BatchNorm(3, momentum=0.9, eps=1e-3), torch.randn(10, 3)
    norm(x)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var(0, correction=0))


def test_batch_norm_of_rows_has_the_gradient_of_any_other() -> None:
    x = torch.randn(10, 3, requires_grad=True)
    factors = torch.randn(10, 3)
    (grad,) = torch.autograd.grad((factors * BatchNorm(3, momentum=0.9, eps=1e-3)(x)).sum(), x)
    (expected,) = torch.autograd.grad(
        (factors * torch.nn.functional.batch_norm(x, None, None, training=True, eps=1e-3)).sum(), x
    )
    torch.testing.assert_close(grad, expected)


def test_batch_norm_rejects_other_shapes() -> None:
    with pytest.raises(ValueError, match="3 dimensions"):
        BatchNorm(3, momentum=0.9, eps=1e-3)(torch.randn(2, 3, 4))


def test_gradient_of_hardtanh_tanh() -> None:
    x = torch.tensor([-3.0, -1.0, -0.3, -0.0, 0.0, 0.5, 1.0, 1.0001, torch.inf], requires_grad=True)
    signs = hardtanh_tanh_sign(x)
    assert signs.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, 1]
    (3 * signs).sum().backward()
    expected = [3 / math.cosh(value) ** 2 if abs(value) <= 1 else 0.0 for value in x.detach().double().tolist()]
    torch.testing.assert_close(x.grad, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_gradient_of_the_wide_sign() -> None:
    x = torch.tensor([-torch.inf, -1.2501, -1.25, -1.0, -0.0, 0.0, 1.1, 1.25, 1.2501], requires_grad=True)
    signs = wide_ste_sign(x)
    assert signs.tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1]
    (3 * signs).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 3, 3, 3, 3, 3, 0]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 8), (15, 12)], ids=str)
def test_a_blur_is_a_convolution(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    filters = (row[:, None] * row).expand(3, 1, 3, 3)
    expected = F.conv2d(F.pad(x, same_padding(x, 3, 2)), filters, stride=2, groups=3)
    torch.testing.assert_close(BlurPool2d()(x), expected)


def test_a_depthwise_convolution_sees_its_channel() -> None:
    layer, x = SameDepthwiseConv2d(3, 3, 2), torch.randn(2, 3, 8, 7)
    for channel in range(3):
        one = x[:, channel : channel + 1]
        expected = F.conv2d(F.pad(one, same_padding(x, 3, 2)), layer.weight[channel : channel + 1], stride=2)
        torch.testing.assert_close(layer(x)[:, channel : channel + 1], expected)


def test_rprelu_shifts_before_and_after() -> None:
    layer, x = RPReLU(2), torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(layer(x), torch.where(x > 0, x, x / 4))
    shift, slope, offset = torch.tensor([[0.5, -0.25], [0.1, -2.0], [3.0, 4.0]]).view(3, 2, 1, 1)
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), (shift, slope, offset), strict=True):
            parameter.copy_(value.flatten())
    y = x + shift
    torch.testing.assert_close(layer(x), torch.where(y > 0, y, y * slope) + offset)


def test_batch_norm_without_factor_and_offset() -> None:
    norm, x = BatchNorm(3, momentum=0.99, eps=1e-3, scale=False, center=False), torch.randn(8, 3, 4, 4)
    assert not list(norm.parameters())
    norm.reset_parameters()
    torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, training=True, eps=1e-3))


def test_he_normal_has_the_variance_of_keras() -> None:
    torch.manual_seed(0)
    weight = he_normal_(torch.empty(64, 32, 3, 3))
    std = (2 / (32 * 9)) ** 0.5
    assert float(weight.std()) == pytest.approx(std, rel=0.02)
    assert float(weight.abs().max()) <= 2 * std / 0.87962566
