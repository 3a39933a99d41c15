"""Convert weights of the PyTorch code that was published with ReActNet.

Its checkpoints of stage 1 (real weights) and of stage 2 are accepted: stage 2 takes a real weight
for its sign times mean|W| of its filter, and so does the conversion. The binary kernels of
ReActNet-A are flat (N, 1) in stage 2 and not in stage 1, which is why the published stage 2 starts
without those of stage 1 and does not say so; here they are taken over.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitfleet.models.networks.reactnet import Binary, ReActNet, ReActNetA

_RESNET = {
    "move0": "binary.threshold",
    "binary_conv": "binary.conv",
    "bn1": "binary.norm",
    "downsample.1": "shortcut.1",
    "downsample.2": "shortcut.2",
    "move1": "activation.0",
    "prelu": "activation.1",
    "move2": "activation.2",
}
_MOBILENET = {
    "move11": "spatial.threshold",
    "binary_3x3": "spatial.conv",
    "bn1": "spatial.norm",
    "move12": "spatial_activation.0",
    "prelu1": "spatial_activation.1",
    "move13": "spatial_activation.2",
    "move21": "pointwise.threshold",
    "binary_pw": "pointwise.conv",
    "binary_pw_down1": "pointwise.conv",
    "binary_pw_down2": "pointwise.conv",
    "bn2": "pointwise.norm",
    "bn2_1": "pointwise.norm",
    "bn2_2": "pointwise.norm",
    "move22": "pointwise_activation.0",
    "prelu2": "pointwise_activation.1",
    "move23": "pointwise_activation.2",
}
"""Layers of a block; of two that are one here, the second has the later filters."""
_OUTSIDE = {
    "conv1": "stem.0",
    "bn1": "stem.1",
    "feature.0.conv1": "stem.0",
    "feature.0.bn1": "stem.1",
    "fc": "head",
}
_BLOCK = re.compile(r"(layer\d+|feature)\.(\d+)\.(.+)")


def is_official(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Return True if `tensors` are named as in the published code of the network."""
    return isinstance(model, ReActNet | ReActNetA) and "fc.weight" in tensors


def from_official(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the tensors of a published checkpoint, and make binary weights +-1.

    mean|W| of each filter moves into the running statistics of the norm after it, so the logits in
    evaluation stay the same.

    Args:
        model: for which `is_official` is True.
        tensors: by their published names, without prefixes of wrappers.

    Returns:
        Tensors by the names of `model`; what does not belong to it keeps its name or shape.

    Raises:
        ValueError: all weights of a filter are 0; two layers that are one here do not fit together.
    """
    parts: dict[str, list[Tensor]] = {}
    blocks = _blocks(tensors)
    for name in sorted(tensors):
        layer, _, variable = name.rpartition(".")
        renamed = f"{_renamed(layer, blocks)}.{'weight' if variable == 'weights' else variable}"
        parts.setdefault(renamed, []).append(tensors[name])
    state, converted = model.state_dict(), {}
    for name, values in parts.items():
        whole = _joined(name, values)
        fits = name in state and whole.numel() == state[name].numel()
        converted[name] = whole.reshape(state[name].shape) if fits else whole
    for name, module in model.named_modules():
        if isinstance(module, Binary):
            _binarize_(converted, name, module)
    return converted


def _joined(name: str, values: list[Tensor]) -> Tensor:
    """Return one tensor of those that are `name` in this model; a counter is the same in all."""
    if values[0].dim() == 0:
        return values[0]
    if len({value.shape[1:] for value in values}) > 1 or any(value.dim() == 0 for value in values):
        shapes = " and ".join(str(list(value.shape)) for value in values)
        raise ValueError(f"{name} is {len(values)} tensors in the file, of shapes {shapes}: they do not fit together")
    return torch.cat(values)


def _blocks(tensors: Mapping[str, Tensor]) -> dict[tuple[str, int], int]:
    """Number the blocks, from 0, in the order of the forward pass."""
    found = {(match[1], int(match[2])) for name in tensors if (match := _BLOCK.match(name))}
    return {place: number for number, place in enumerate(sorted(found - {("feature", 0)}))}


def _renamed(layer: str, blocks: Mapping[tuple[str, int], int]) -> str:
    match = _BLOCK.fullmatch(layer)
    if match is None or layer in _OUTSIDE:
        return _OUTSIDE.get(layer, layer)
    names = _MOBILENET if match[1] == "feature" else _RESNET
    place = (match[1], int(match[2]))
    return f"blocks.{blocks[place]}.{names[match[3]]}" if place in blocks and match[3] in names else layer


def _binarize_(tensors: dict[str, Tensor], prefix: str, module: Binary) -> None:
    """Replace a real weight by its signs; what follows divides by the standard deviation."""
    weight, mean, variance = (
        tensors.get(f"{prefix}.{name}") for name in ("conv.weight", "norm.running_mean", "norm.running_var")
    )
    if weight is None or mean is None or variance is None or weight.shape != module.conv.weight.shape:
        return
    scale = weight.double().abs().mean((1, 2, 3))
    if not (scale > 0).all():
        raise ValueError(f"output filter {int((scale > 0).int().argmin())} of {prefix}.conv.weight is all 0")
    eps = module.norm.eps
    tensors[f"{prefix}.conv.weight"] = torch.where(weight >= 0, 1.0, -1.0)
    tensors[f"{prefix}.norm.running_mean"] = (mean / scale).to(mean.dtype)
    tensors[f"{prefix}.norm.running_var"] = ((variance + eps) / scale**2 - eps).to(variance.dtype)
