"""Where the sums of a binary convolution stop being exact: its output is an integer, which each
precision holds to a bound.

Of a fan-in of n the sums have the parity of n: an even fan-in is exact twice as far, as every
second integer is.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.quantizers import ste_sign

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXACT = {"bf16": 256, "fp16": 2048}
"""All integers up to it are held."""


def all_sums(fan_in: int, precision: str) -> Tensor:
    """The outputs of a binary 1x1 convolution whose k-th weight row has k times -1, on an input of
    +1: fan_in - 2 k."""
    layer = QuantConv2d(fan_in, fan_in + 1, 1, input_quantizer=ste_sign)
    with torch.no_grad():
        layer.weight.copy_(torch.ones(fan_in + 1, fan_in).tril(-1).mul(-2).add(1)[:, :, None, None])
    with torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32"):
        output: Tensor = layer(torch.ones(1, fan_in, 1, 1))
    assert output.dtype == DTYPES[precision]
    return output.flatten().double()


def truth(fan_in: int) -> Tensor:
    return fan_in - 2 * torch.arange(fan_in + 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("precision", "fan_in"),
    [("bf16", 255), ("bf16", 256), ("bf16", 512), ("fp16", 256), ("fp16", 2048), ("fp16", 4096), ("fp32", 4608)],
)
def test_sums_up_to_the_bound_are_exact(precision: str, fan_in: int) -> None:
    assert torch.equal(all_sums(fan_in, precision), truth(fan_in))


@pytest.mark.parametrize(("precision", "fan_in"), [("bf16", 257), ("bf16", 514), ("fp16", 2049), ("fp16", 4098)])
def test_beyond_the_bound_large_sums_are_rounded_and_small_ones_are_not(precision: str, fan_in: int) -> None:
    found, exact = all_sums(fan_in, precision), truth(fan_in)
    bound = EXACT[precision] * (1 if fan_in % 2 else 2)
    wrong = found != exact
    assert wrong[[0, -1]].all()  # all of one sign
    assert torch.equal(found, exact.to(DTYPES[precision]).double())  # the sum itself is exact, and rounded once
    assert not wrong[exact.abs() <= bound].any()
    # Rounding changes no sign, so a quantizer that follows directly sees what it would see in fp32.
    assert torch.equal(found.sign(), exact.sign())


def test_fp32_sums_are_exact_to_24_bits() -> None:
    """TF32 sums in fp32 too; so no fan-in of a network that fits in memory is too large for it."""
    ones = torch.ones(1, 2**24 + 1)
    assert F.linear(ones[:, : 2**24], ones[:, : 2**24]).item() == 2**24
    assert F.linear(ones, ones).item() != 2**24 + 1


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Round as a tensor core reads fp32: 10 bits of the fraction, to the nearest, ties to even."""
    bits = x.view(torch.int32)
    even = (bits >> 13) & 1
    return ((bits + 0xFFF + even) & ~0x1FFF).view(torch.float32)


def test_tf32_leaves_signs_alone_and_rounds_what_is_real() -> None:
    signs = torch.tensor([1.0, -1.0, 0.0])  # 0 is the padding
    assert torch.equal(rounded_to_tf32(signs), signs)
    assert rounded_to_tf32(torch.tensor([1 + 2**-10, 1 + 2**-12])).tolist() == [1 + 2**-10, 1.0]
    # A binary convolution is the same in it, the gradient of its weights is not: one operand of
    # that is real.
    torch.manual_seed(0)
    x, weight, grad = torch.randn(2, 64, 8, 8).sign(), torch.randn(16, 64, 3, 3).sign(), torch.randn(2, 16, 6, 6)
    assert torch.equal(F.conv2d(rounded_to_tf32(x), rounded_to_tf32(weight)), F.conv2d(x, weight))
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double())
    for operand, low, high in ((grad, 0.0, 1e-6), (rounded_to_tf32(grad), 1e-5, 1e-3)):
        found = torch.nn.grad.conv2d_weight(x.double(), weight.shape, operand.double())
        error = ((found - exact).norm() / exact.norm()).item()
        assert low <= error <= high
