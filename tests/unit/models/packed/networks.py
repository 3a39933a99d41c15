"""Networks with weights that make tests of packed programs sharp."""

from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.real_layers import ChannelAffine, ChannelBias
from bitfleet.models.networks import real_to_binary
from bitfleet.packed.lowering import lower
from bitfleet.packed.program import Kind, Program, to_bytes
from bitfleet.packed.runner import PackedNetwork, library
from bitfleet.trainer.data import normalize

Images = NDArray[np.uint8]
MEAN, STD = (128.0, 64.0, 128.0), (64.0, 64.0, 32.0)
PATHS = [path for path in ("avx512", "avx2", "neon", "portable") if library().packed_use_path(path.encode()) == 0]
"""Instruction sets of this CPU."""


def network(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """Return a network in evaluation mode, with random statistics of its normalizations."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 1)
            module.running_var.uniform_(0.5, 20)
    for param in model.parameters():
        if param.ndim == 1:
            param.data.normal_(0.1, 1)
    return model.eval()


def make_exact(model: nn.Module) -> nn.Module:
    """Replace the values of a network so that float32 computes it without rounding, in any order.

    All values are multiples of a power of 2 with few digits, for images whose pixels are multiples
    of 32. Many values before a sign are exactly 0 then. The head is left alone, and LayerNorm has
    no such values. A sigmoid gets values whose result is exactly 0, 1/2 or 1.
    """
    generator = torch.Generator().manual_seed(1)

    def choose(like: Tensor, *values: float) -> Tensor:
        indices = torch.randint(len(values), like.shape, generator=generator)
        return torch.tensor(values, dtype=torch.float32)[indices]

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(choose(module.running_mean, -2, 0, 1))
            module.running_var.fill_(1 - module.eps)
            if module.weight is not None:
                module.weight.data = choose(module.weight, -0.25, 0.125, 0.25, 0.25)
            if module.bias is not None:
                module.bias.data = choose(module.bias, -0.5, 0, 0.5)
        elif isinstance(module, ChannelBias):
            module.bias.data = choose(module.bias, -1, -0.5, 0, 0.5)
        elif isinstance(module, nn.PReLU):  # more digits of a slope would pile up over blocks
            module.weight.data = choose(module.weight, -1, 0, 1, 1, 2)
        elif isinstance(module, real_to_binary._Factors):
            module.reduce.weight.data = choose(module.reduce.weight, -(2.0**20), 0, 0, 2.0**20)
            module.expand.weight.data = choose(module.expand.weight, -8, 0, 0, 1, 1)
        elif isinstance(module, ChannelAffine):
            module.weight.data = choose(module.weight, -0.125, 0.0625, 0.125)
            module.bias.data = choose(module.bias, -0.5, 0, 0.5)
        elif isinstance(module, nn.Conv2d) and not isinstance(module, QuantConv2d):
            if module.groups > 1:
                module.weight.data = choose(module.weight, -1, 0, 1, 2)
            elif module.kernel_size == (1, 1) and 4 * module.in_channels <= module.out_channels:  # of a stem
                module.weight.data = choose(module.weight, -4, -2, 0, 2, 4)
            elif module.kernel_size == (1, 1):  # of a shortcut: a sum of few channels
                module.weight.data = choose(module.weight, *[0.0] * 10, 0.25, -0.25)
            else:
                module.weight.data = choose(module.weight, -0.125, 0, 0.125, 0.25)
    return model


def exact_images(count: int, size: int, seed: int = 0) -> Images:
    """Return random images, uint8 [N, size, size, 3], of multiples of 32."""
    return 32 * np.random.default_rng(seed).integers(0, 8, (count, size, size, 3), dtype=np.uint8)


def random_images(count: int, size: int, seed: int = 0) -> Images:
    """Return random images, uint8 [N, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def packed(program: Program, path: str | None = None) -> PackedNetwork:
    """Return the network of the file of `program`."""
    return PackedNetwork(to_bytes(program), {}, path)


def lowered(model: nn.Module, size: int) -> Program:
    """Return the program for images of `size` pixels with MEAN and STD."""
    return lower(model, size, MEAN, STD)


def expected_logits(model: nn.Module, images: Images) -> NDArray[np.float32]:
    """Return the logits of the trainer's network, an image at a time."""
    with torch.no_grad():
        rows = [model(normalize(torch.tensor(image[None]), MEAN, STD)) for image in images]
    return torch.cat(rows).numpy()


def expected_sums(model: nn.Module, image: Images) -> list[NDArray[np.int32]]:
    """Return the integers of each binary layer of the trainer's network, [H, W, C] flat, in
    order."""
    found: list[NDArray[np.int32]] = []

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        assert torch.equal(output, output.round())
        rows = output.movedim(1, -1) if output.ndim == 4 else output
        found.append(rows.reshape(-1).numpy().astype(np.int32))

    layers = [m for m in model.modules() if isinstance(m, (QuantConv2d, QuantLinear)) and m.input_quantizer]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    expected_logits(model, image[None])
    for hook in hooks:
        hook.remove()
    assert len(found) == len(layers) > 0
    return found


def packed_sums(program: Program, runner: PackedNetwork, image: Images, num_threads: int = 1) -> list[Any]:
    """Return the integers of each binary layer of a packed network."""
    indices = [index for index, o in enumerate(program.operations) if o.kind is Kind.BINARY_CONV]
    return [runner.sums(image, index, num_threads) for index in indices]
