"""Print fan-ins of binary layers, and how many of their sums bf16 and fp16 round.

    python docs/precision.py

Networks have random weights and see two random images each; it takes seconds.
"""

import torch
from torch import Tensor, nn

from bitfleet.models import ModelConfig, create_model
from bitfleet.models.layers.layers import QuantConv2d, QuantLinear

SIZES = {"birealnet18": 224, "birealnet34": 224, "xnornet": 224, "binarynet": 32, "birealnet_small": 32}


def binary_layers(model: nn.Module) -> list[QuantConv2d | QuantLinear]:
    """Return the layers whose products are all +-1; the first one of BinaryNet sees the image."""
    layers = [module for module in model.modules() if isinstance(module, QuantConv2d | QuantLinear)]
    return [layer for layer in layers if layer.input_quantizer is not None]


def sums_of(model: nn.Module, layers: list[QuantConv2d | QuantLinear], size: int) -> Tensor:
    """Return all outputs of `layers` for two random images."""
    outputs: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, images, output: outputs.append(output.flatten()))
    with torch.no_grad():
        model(torch.randn(2, 3, size, size))
    return torch.cat(outputs)


def rounded_share(sums: Tensor, dtype: torch.dtype) -> float:
    """Return the share of the integers `sums` that `dtype` cannot hold."""
    return (sums.to(dtype).to(sums.dtype) != sums).double().mean().item()


print("network          layers  fan-in          > 256  > 512  > 2,048  > 4,096  largest |sum|  rounded: bf16  fp16")
for name, size in SIZES.items():
    torch.manual_seed(0)
    model = create_model(ModelConfig(name=name, num_classes=10)).eval()
    layers = binary_layers(model)
    sums = sums_of(model, layers, size)
    fan_in = [layer.weight[0].numel() for layer in layers]
    above = [sum(numel > bound for numel in fan_in) for bound in (256, 512, 2048, 4096)]
    print(
        f"{name:15}  {len(layers):6}  {min(fan_in):5,} to {max(fan_in):5,}  {above[0]:5}  {above[1]:5}  {above[2]:7}  "
        f"{above[3]:7}  {sums.abs().max().item():13,.0f}  {rounded_share(sums, torch.bfloat16):13.1%}  "
        f"{rounded_share(sums, torch.float16):.1%}"
    )
