"""A small network with everything that programs have and Bi-Real Nets lack."""

import torch
from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.quantizers import approx_sign, ste_sign
from bitfleet.models.layers.real_layers import SameAvgPool2d, SameConv2d
from bitfleet.trainer.data import normalize
from tests.unit.models.packed.networks import MEAN, STD, exact_images, make_exact

SIZE = 37
"""Height and width of its images."""


class Mixed(nn.Module):
    """ReLU, biases, kernels of even size, strides of 3 and 4, binary weights on real inputs, a
    shortcut from sums, and channels that are always or never +1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 20, 5, 3, padding=1),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            nn.MaxPool2d(3, 1),
        )
        self.first = nn.Sequential(
            nn.BatchNorm2d(20),
            QuantConv2d(20, 33, 4, 2, padding="same", input_quantizer=ste_sign),
            nn.MaxPool2d(2, 1),
            nn.BatchNorm2d(33),
        )
        self.second = nn.Sequential(
            QuantConv2d(33, 40, 3, input_quantizer=approx_sign),
            nn.BatchNorm2d(40),
            QuantConv2d(40, 34, 2, input_quantizer=approx_sign),
            nn.MaxPool2d(2, 1, padding=1),
            nn.BatchNorm2d(34),
            QuantConv2d(34, 33, 2, padding="valid", input_quantizer=approx_sign),
        )
        self.real = nn.Sequential(QuantConv2d(33, 7, 2, input_quantizer=None, padding="valid"), SameAvgPool2d(2, 2))
        self.last = nn.Sequential(SameConv2d(7, 12, 2), nn.ReLU(), nn.BatchNorm2d(12), nn.Flatten())
        self.head = nn.Sequential(QuantLinear(12 * 2 * 2, 6, input_quantizer=ste_sign), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, 37, 37] -> logits [N, 6]."""
        x = self.first(self.stem(x))
        x = x + self.second(x)
        logits: Tensor = self.head(self.last(self.real(x)))
        return logits


def mixed() -> nn.Module:
    """Return the network with weights that float32 computes without rounding, and means that let
    signs differ."""
    torch.manual_seed(0)
    model = make_exact(Mixed().eval())
    stem = model.get_submodule("stem.0")
    assert isinstance(stem, nn.Conv2d)
    assert stem.bias is not None
    stem.weight.data = torch.randn_like(stem.weight).sign() / 8
    stem.bias.data = torch.randn_like(stem.bias).round() / 4
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(_centre) for norm in norms]
    with torch.no_grad():
        model(normalize(torch.from_numpy(exact_images(8, SIZE)), MEAN, STD))
    for hook in hooks:
        hook.remove()
    for name in ("second.1", "second.4"):
        norm = model.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.data[:2] = 0
        norm.bias.data[:2] = norm.bias.new_tensor([-0.5, 0.5])
    return model


def _centre(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    mean = inputs[0].transpose(0, 1).flatten(1).mean(1)
    norm.running_mean.copy_(mean.round())
