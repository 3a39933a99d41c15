"""Quantizers inside torch.compile have the gradients that they have in eager torch."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitfleet.models.layers.quantizers import Quantizer, approx_sign, hardtanh_tanh_sign, ste_sign, wide_ste_sign


@pytest.mark.parametrize("quantizer", [ste_sign, wide_ste_sign, approx_sign, hardtanh_tanh_sign])
def test_gradients_are_those_of_eager_torch(quantizer: Quantizer) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 2 * torch.randn(2, 8, 5, 5, generator=generator)
    weight = torch.randn(4, 8, 3, 3, generator=generator)

    def convolve(x: Tensor) -> Tensor:
        return F.conv2d(quantizer(x), weight)

    def result(function: Quantizer) -> tuple[Tensor, Tensor]:
        x = values.clone().requires_grad_()
        output = function(x)
        output.square().sum().backward()
        assert x.grad is not None
        return output.detach(), x.grad

    output, gradient = result(convolve)
    compiled_output, compiled_gradient = result(torch.compile(convolve, fullgraph=True, backend="aot_eager"))
    assert torch.equal(compiled_output, output)
    limit = 1.25 if quantizer is wide_ste_sign else 1
    assert bool(gradient[values.abs() > limit].eq(0).all())
    assert bool(gradient[values.abs() < limit].ne(0).all())
    torch.testing.assert_close(compiled_gradient, gradient)
