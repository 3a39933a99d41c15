"""Count parameters and multiply-accumulates of a network, 1-bit and 32-bit separately."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.real_layers import BlurPool2d


@dataclass(frozen=True)
class ModelSize:
    """Size of a network; multiply-accumulates are per image.

    Attributes:
        num_parameters: trainable parameters, binary ones included.
        num_binary_parameters: parameters marked binary.
        num_running_statistics: elements of floating point buffers (means and variances).
        num_macs_1bit: multiply-accumulates of a binary weight with a binary input.
        num_macs_32bit: all others of convolutions and linear layers.
    """

    num_parameters: int
    num_binary_parameters: int
    num_running_statistics: int
    num_macs_1bit: int
    num_macs_32bit: int

    def __str__(self) -> str:
        return (
            f"{self.num_parameters:,} parameters, {self.num_binary_parameters:,} of them 1-bit; MACs per image: "
            f"{self.num_macs_1bit:,} 1-bit, {self.num_macs_32bit:,} 32-bit"
        )


def count(model: nn.Module, input_size: tuple[int, ...]) -> ModelSize:
    """Count in one forward pass like larq's summary: padding counts, norms and most pools do not.

    A blur pool counts, as the depthwise convolution that it is in larq-zoo.

    Args:
        model: run in evaluation mode and left unchanged.
        input_size: shape of one image, e.g. (3, 224, 224).
    """
    macs = {True: 0, False: 0}
    for layer, count_of_layer in layer_macs(model, input_size).items():
        macs[isinstance(layer, QuantConv2d | QuantLinear) and layer.input_quantizer is not None] += count_of_layer
    parameters = [p for p in model.parameters() if p.requires_grad]
    return ModelSize(
        num_parameters=sum(p.numel() for p in parameters),
        num_binary_parameters=sum(p.numel() for p in parameters if getattr(p, "binary", False)),
        num_running_statistics=sum(b.numel() for b in model.buffers() if b.is_floating_point()),
        num_macs_1bit=macs[True],
        num_macs_32bit=macs[False],
    )


def layer_macs(model: nn.Module, input_size: tuple[int, ...]) -> dict[nn.Module, int]:
    """Count multiply-accumulates per image of every convolution, linear layer and blur reached.

    Args:
        model: run in evaluation mode on any device ("meta" computes nothing) and left unchanged.
        input_size: shape of one image, e.g. (3, 224, 224).
    """
    macs: dict[nn.Module, int] = {}

    def add_macs(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        per_element = layer.macs_per_output if isinstance(layer, BlurPool2d) else layer.weight[0].numel()
        num_elements = inputs[0].numel() if getattr(layer, "transposed", False) else output.numel()
        macs[layer] = macs.get(layer, 0) + num_elements * per_element

    kinds = _ConvNd | nn.Linear | BlurPool2d
    modes = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_hook(add_macs) for m in model.modules() if isinstance(m, kinds)]
    first = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size, dtype=first.dtype, device=first.device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return macs
