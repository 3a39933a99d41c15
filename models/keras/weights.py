"""Load weights written by Keras or larq: names, order, memory layout, scales of larq-zoo's kernels.

Each supported network is described once, in the order in which its published Keras code creates the
layers. A layer's name is its class and a number in order of creation; `model.get_weights()` lists
the layers by depth in the graph.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from bitfleet.models.keras.files import Array, read_keras_file
from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.real_layers import (
    BatchNorm,
    BlurPool2d,
    ChannelAffine,
    ChannelLayerNorm,
    SameConv2d,
    SameDepthwiseConv2d,
)
from bitfleet.models.networks.binary_alexnet import BinaryAlexNet
from bitfleet.models.networks.binarynet import BinaryNet
from bitfleet.models.networks.birealnet import BiRealNet
from bitfleet.models.networks.quicknet import QuickNet
from bitfleet.models.networks.real_to_binary import RealToBinary
from bitfleet.models.networks.resnet_e import BinaryResNetE
from bitfleet.models.networks.xnornet import XNORNet

Scales = Literal["none", "larq-zoo"]


class _Blur(nn.Module):
    """Stands for a BlurPool2d, whose filter is a variable in Keras."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.weight = (row[:, None] * row).repeat(num_channels, 1, 1, 1)


_KINDS: dict[type[nn.Module], str] = {
    SameConv2d: "conv2d",
    SameDepthwiseConv2d: "depthwise_conv2d",
    _Blur: "depthwise_conv2d",
    QuantConv2d: "quant_conv2d",
    nn.Linear: "dense",
    QuantLinear: "quant_dense",
    BatchNorm: "batch_normalization",
    ChannelLayerNorm: "layer_normalization",
    nn.PReLU: "p_re_lu",
}
_LARQ_KINDS: dict[type[nn.Module], str] = {
    **_KINDS,
    SameConv2d: "quant_conv2d",
    SameDepthwiseConv2d: "quant_depthwise_conv2d",
    nn.Linear: "quant_dense",
}
"""Names in a network whose layers are larq's, whether quantized or not."""
_NAMES = tuple(dict.fromkeys([*_KINDS.values(), *_LARQ_KINDS.values()]))
_NORMS = (_KINDS[BatchNorm], _KINDS[ChannelLayerNorm])
_NORM_VARIABLES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_VARIABLES: dict[str, dict[str, str]] = {
    **dict.fromkeys(_NORMS, _NORM_VARIABLES),
    **{kinds[SameDepthwiseConv2d]: {"depthwise_kernel": "weight"} for kinds in (_KINDS, _LARQ_KINDS)},
    _KINDS[nn.PReLU]: {"alpha": "weight"},
}
"""The attribute of a module that holds each variable of a class; others have kernel and bias."""
_LAYER = re.compile(rf"({'|'.join(_NAMES)})(?:_([1-9]\d*))?")
_VARIABLE = re.compile(r"(\w+)(?::0)?")


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A layer with variables, as Keras sees it."""

    module: Any
    kind: str
    """Name of its class in Keras."""
    number: int
    """Number of layers of the class created before it."""
    norm: nn.Module | None
    """The norm of its output; only a max pool may be between."""
    num_pixels: int
    """Pixels per channel of the image that was flattened into its input; 1 if none was."""
    label: str | None = None
    """The name that the published code gives it, if not that of its class and number."""

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.number}" if self.number else self.kind

    @property
    def variables(self) -> dict[str, Tensor]:
        """The tensor that each Keras variable fills, in Keras' order."""
        names = _VARIABLES.get(self.kind, {"kernel": "weight", "bias": "bias"})
        targets = {name: getattr(self.module, attribute, None) for name, attribute in names.items()}
        return {name: target for name, target in targets.items() if target is not None}

    def shape(self, variable: str) -> tuple[int, ...]:
        """Shape of a variable in a file."""
        target = self.variables[variable]
        if variable == "alpha":
            return (1, 1, *target.shape)
        if variable == "depthwise_kernel":
            return tuple(target.permute(2, 3, 0, 1).shape)
        return tuple(target.permute(2, 3, 1, 0).shape if target.dim() == 4 else target.t().shape)

    def value(self, variable: str, array: Array) -> Tensor:
        """Convert a variable of a file to PyTorch's layout."""
        if variable == "kernel":
            return kernel_from_keras(array, self.num_pixels)
        tensor = torch.from_numpy(array)
        return tensor.permute(2, 3, 0, 1) if variable == "depthwise_kernel" else tensor.flatten()


class _Found(NamedTuple):
    name: str
    array: Array


_Matches = dict[_Layer, dict[str, _Found]]


def load_keras_weights(model: nn.Module, path: Path, *, scales: Scales = "none") -> None:
    """Load weights written by Keras or larq in place; a file that does not fit changes nothing.

    A binary kernel is replaced by its sign (0 -> +1), so latent weights are accepted. If the file
    has no gamma (`scale=False`, as in larq-zoo's XNOR-Net), the norms get a factor of 1.

    Args:
        model: `BinaryNet`, `XNORNet` or `BiRealNet`, with either norm, or `QuickNet`,
            `BinaryResNetE`, `RealToBinary` or `BinaryAlexNet`.
        path: .h5 of `model.save_weights` or `model.save`, .keras, or .npz with arrays named like
            Keras' variables ("quant_conv2d_1/kernel:0"; numbers may start anywhere, Keras counts
            over all models of a process) or with those of `np.savez(path, *model.get_weights())`.
            Layers may be in nested models.
        scales: "larq-zoo" if a kernel stands for its sign times mean|W| of each output filter
            (`larq.quantizers.MagnitudeAwareSign`): the factor moves into the BatchNorm after the
            layer and the logits stay the same. "none": only the sign counts.

    Raises:
        ValueError: the file does not exist or is not from Keras; a variable is missing, superfluous
            or of another shape; the norm is another one; a scale is 0; or the network is not
            supported.
    """
    if scales not in get_args(Scales):
        raise ValueError(f'scales is {scales!r}; expected "none" or "larq-zoo"')
    layers = _layers(model)
    arrays = _by_class(read_keras_file(path), layers)
    network = f"{type(model).__name__} with {next(layer.kind for layer in layers if layer.kind in _NORMS)}"
    match = _match_by_name
    if all(re.fullmatch(r"arr_\d+", name) for name in arrays):
        match = _match_by_order
    elif all(re.search(r"/vars/\d+$", name) for name in arrays):
        match = _match_by_class
    found = match(arrays, layers, network, path)
    _check(found, network, path)
    if scales == "larq-zoo":
        _fold_scales(found, path)
    with torch.no_grad():
        for layer, variables in found.items():
            for variable, (_, array) in variables.items():
                value = layer.value(variable, array)
                if isinstance(layer.module, QuantConv2d | QuantLinear):
                    value = torch.where(value >= 0, 1.0, -1.0)
                layer.variables[variable].copy_(value)


def kernel_from_keras(array: Array, num_pixels: int = 1) -> Tensor:
    """Transpose a kernel to PyTorch's layout: HWIO -> OIHW, dense (in, out) -> (out, in).

    Args:
        array: [height, width, in, out] or [in, out].
        num_pixels: height times width of the image flattened into the input of a dense layer: Keras
            flattens H, W, C and PyTorch C, H, W.
    """
    if array.ndim == 4:
        return torch.from_numpy(np.ascontiguousarray(array.transpose(3, 2, 0, 1)))
    pixels = array.reshape(num_pixels, -1, array.shape[1])
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 1, 0)).reshape(array.shape[::-1]))


def _layers(model: nn.Module) -> list[_Layer]:
    """List the layers of a network in the order of `get_weights`."""
    if isinstance(model, BinaryNet):
        return _chain([*model.features, *model.classifier], num_pixels=3 * 3)
    if isinstance(model, XNORNet):
        return _chain([*model.features, *model.classifier], num_pixels=1)
    if isinstance(model, BinaryAlexNet):
        return _chain([*model.features, *model.classifier], num_pixels=6 * 6)
    if isinstance(model, BiRealNet):
        return _birealnet(model)
    if isinstance(model, BinaryResNetE):
        return _residual(model)
    if isinstance(model, QuickNet):
        return _quicknet(model)
    if isinstance(model, RealToBinary):
        return _real_to_binary(model)
    raise ValueError(
        f"the network is {type(model).__name__}, whose Keras layers are unknown; expected BinaryNet, XNORNet, "
        "BiRealNet, QuickNet, BinaryResNetE, RealToBinary or BinaryAlexNet"
    )


def _by_class(arrays: dict[str, Array], layers: Sequence[_Layer]) -> dict[str, Array]:
    """Replace the names of layers that the published code chose by those of class and number."""
    names = {layer.label: layer.name for layer in layers if layer.label}
    return {"/".join(names.get(part, part) for part in name.split("/")): array for name, array in arrays.items()}


class _Created(list[_Layer]):
    def __init__(self, kinds: dict[type[nn.Module], str] = _KINDS) -> None:
        super().__init__()
        self.kinds = kinds

    def add(
        self, module: nn.Module, norm: nn.Module | None = None, num_pixels: int = 1, label: str | None = None
    ) -> _Layer:
        """Append the next layer that Keras creates."""
        kind = self.kinds[type(module)]
        self.append(_Layer(module, kind, sum(layer.kind == kind for layer in self), norm, num_pixels, label))
        return self[-1]


def _chain(modules: Sequence[nn.Module], num_pixels: int) -> list[_Layer]:
    """List the layers of a sequential network; `num_pixels` is for the layer after its Flatten."""
    created = _Created()
    for index, module in enumerate(modules):
        if type(module) not in _KINDS:
            continue
        rest = [later for later in modules[index + 1 :] if not isinstance(later, nn.MaxPool2d)]
        norm = rest[0] if rest and _KINDS.get(type(rest[0])) in _NORMS else None
        created.add(module, norm, num_pixels if isinstance(modules[index - 1], nn.Flatten) else 1)
    return created


def _birealnet(model: BiRealNet) -> list[_Layer]:
    """List the layers of a Bi-Real Net that was published."""
    if model.residual != "double" or isinstance(model.stem[1], ChannelAffine):
        raise ValueError(
            'the BiRealNet has residual="single" or norm="none", which no Keras code was published for; expected '
            'residual="double" and norm "batch" or "layer"'
        )
    return _residual(model)


def _residual(model: BiRealNet | BinaryResNetE) -> list[_Layer]:
    """List the layers of a residual network: Keras creates a shortcut first and lists it second."""
    created = _Created()
    layers = [created.add(layer) for layer in model.stem if type(layer) in _KINDS]
    block: Any
    for block in model.blocks:
        shortcut = []
        if isinstance(block.shortcut, nn.Sequential):
            shortcut = [created.add(block.shortcut[1]), created.add(block.shortcut[2])]
        conv, norm = created.add(block.conv, block.norm), created.add(block.norm)
        layers += [conv, *shortcut[:1], norm, *shortcut[1:]]
    return [*layers, created.add(model.head)]


def _quicknet(model: QuickNet) -> list[_Layer]:
    """List the layers of a QuickNet."""
    created = _Created(_LARQ_KINDS)
    module: Any
    for module in [*model.stem, *model.blocks, model.head]:
        for layer in list(module.children()) or [module]:
            if isinstance(layer, BlurPool2d):
                created.add(_Blur(created[-1].module.num_features))
            elif type(layer) in _KINDS:
                created.add(layer)
    return list(created)


def _real_to_binary(model: RealToBinary) -> list[_Layer]:
    """List the layers of a Real-to-Binary network, which all have names, by depth in the graph."""
    created = _Created()
    conv, norm, activation, _ = model.stem
    first = "r2b_bnn_block_1"
    layers = [
        created.add(conv, label=f"{first}_conv2d"),
        created.add(norm, label=f"{first}_batch_norm"),
        created.add(activation, label=f"{first}_prelu"),
    ]
    block: Any
    for index, block in enumerate(model.blocks):
        name = f"r2b_bnn_block_{2 + index // 2}{'ab'[index % 2]}"
        shortcut = []
        if isinstance(block.shortcut, nn.Sequential):
            shortcut = [
                created.add(block.shortcut[1], label=f"{name}_shortcut_conv2d"),
                created.add(block.shortcut[2], label=f"{name}_shortcut_batch_norm"),
            ]
        layers += [
            created.add(block.norm, label=f"{name}_batch_norm"),
            created.add(block.factors.reduce, label=f"{name}_scaling_dense_reduce"),
            created.add(block.factors.expand, label=f"{name}_scaling_dense_expand"),
            created.add(block.conv, label=f"{name}_conv2d"),
            *shortcut[:1],
            created.add(block.activation, label=f"{name}_prelu"),
            *shortcut[1:],
        ]
    last = f"r2b_bnn_block_{2 + len(model.blocks) // 2}"
    return [*layers, created.add(model.head, label=f"{last}_logits")]


def _match_by_order(arrays: dict[str, Array], layers: list[_Layer], network: str, path: Path) -> _Matches:
    """Match the arrays of `get_weights`, which have no names."""
    expected = [(layer, variable) for layer in layers for variable in layer.variables]
    without_gamma = [(layer, variable) for layer, variable in expected if variable != "gamma"]
    pairs = without_gamma if len(arrays) == len(without_gamma) else expected
    if len(arrays) != len(pairs):
        raise ValueError(f"{path} has {len(arrays)} arrays; {network} expects {len(pairs)}")
    found: _Matches = {layer: {} for layer in layers}
    for index, (layer, variable) in enumerate(pairs):
        if f"arr_{index}" not in arrays:
            raise ValueError(f"{path} has no arr_{index}; {network} expects arr_0 to arr_{len(pairs) - 1}")
        name = f"arr_{index} ({layer.name}/{variable})"
        found[layer][variable] = _Found(name, arrays[f"arr_{index}"])
    return found


def _match_by_class(arrays: dict[str, Array], layers: list[_Layer], network: str, path: Path) -> _Matches:
    """Match names of Keras >= 2.12 ("layers/conv2d_1/vars/0"), numbered as in `get_weights`."""
    in_order = sorted(arrays, key=_numbered)
    groups = _grouped({name.replace("/vars/", "/"): (name, arrays[name]) for name in in_order}, path)
    found: _Matches = {layer: {} for layer in layers}
    for kind in _worst_first(groups):
        targets = [layer for layer in layers if layer.kind == kind]
        numbered = sorted(groups[kind].items())
        _check_order([next(iter(variables.values())).name for _, variables in numbered], kind, path)
        _refuse_surplus(kind, targets, dict(numbered[len(targets) :]), network, path)
        for layer, (_, variables) in zip(targets, numbered, strict=False):
            names = list(layer.variables)
            if len(variables) == len(names) - 1 and names[0] == "gamma":
                names = names[1:]
            if surplus := list(variables.values())[len(names) :]:
                raise ValueError(
                    f"{path} has {surplus[0].name} of shape {surplus[0].array.shape}; {network} expects only "
                    f"{', '.join(names)} of that layer"
                )
            found[layer] = dict(zip(names, [variables[number] for number in sorted(variables, key=int)], strict=False))
    return found


def _numbered(name: str) -> list[tuple[str, int]]:
    """Return a key that sorts x_10 after x_9, and x before x_1, in each part of a path."""
    parts = [part.rpartition("_") for part in name.split("/")]
    return [(head, int(tail)) if head and tail.isdecimal() else (head + mark + tail, 0) for head, mark, tail in parts]


def _check_order(names: Sequence[str], kind: str, path: Path) -> None:
    """Raise ValueError if the file does not say the order of nested models."""
    models = {re.sub(r"_\d+", "", name.split(f"/{kind}")[0]): name for name in names}
    if len(models) > 1:
        first, second = list(models.values())[:2]
        raise ValueError(
            f"{path} has {first} and {second}, and does not say which of them comes first: "
            f"save the weights with np.savez(path, *model.get_weights())"
        )


def _match_by_name(arrays: dict[str, Array], layers: list[_Layer], network: str, path: Path) -> _Matches:
    """Match layers of a class by number, or by order if Keras had counted other models before."""
    groups = _grouped({name: (name, array) for name, array in arrays.items()}, path)
    found: _Matches = {layer: {} for layer in layers}
    for kind in _worst_first(groups):
        targets = [layer for layer in layers if layer.kind == kind]
        # Keras counts over all models of a process: numbers are valid across nested ones unless
        # layers were named.
        by_number = {number: variables for (_, number), variables in groups[kind].items()}
        numbered = by_number if len(by_number) == len(groups[kind]) else {}
        if not numbered or max(numbered) >= len(targets):
            numbered = {order: groups[kind][place] for order, place in enumerate(_places(groups[kind], bool(numbered)))}
        for layer in targets:
            found[layer] = numbered.pop(layer.number, {})
        _refuse_surplus(kind, targets, numbered, network, path)
    return found


_Place = tuple[int, int]
"""A nested model, in the order of the file, and the number of a layer in it."""


def _places(group: dict[_Place, Any], by_number: bool) -> list[_Place]:
    """Sort the layers of a class by number or, if nested models share numbers, model by model."""
    return sorted(group, key=lambda place: place[1]) if by_number else sorted(group)


def _grouped(arrays: dict[str, tuple[str, Array]], path: Path) -> dict[str, dict[_Place, dict[str, _Found]]]:
    """Group variables, keyed "models/around/layer/variable", by class, layer and variable."""
    groups: dict[str, dict[_Place, dict[str, _Found]]] = {}
    models: dict[str, int] = {}
    for place, (name, array) in arrays.items():
        *above, last = place.split("/")
        matches = [(index, match) for index, part in enumerate(above) if (match := _LAYER.fullmatch(part))]
        variable = _VARIABLE.fullmatch(last)
        if not matches or variable is None:
            raise ValueError(
                f"{path} has {name} of shape {array.shape}; expected names as quant_conv2d_1/kernel:0, of layers "
                f"called {', '.join(_NAMES)}, or only arr_0, arr_1, ..."
            )
        index, layer = matches[0]
        model = models.setdefault("/".join(above[:index]), len(models))
        variables = groups.setdefault(layer[1], {}).setdefault((model, int(layer[2] or 0)), {})
        if other := variables.get(variable[1]):
            raise ValueError(
                f"{path} has {name} of shape {array.shape} twice: {other.name} is the same variable of the same layer; "
                f"expected it once"
            )
        variables[variable[1]] = _Found(name, array)
    return groups


def _worst_first(groups: dict[str, Any]) -> list[str]:
    """Sort the classes, norms first: a wrong norm is the clearest mismatch."""
    return sorted(groups, key=_NORMS.__contains__, reverse=True)


def _refuse_surplus(
    kind: str, targets: Sequence[_Layer], surplus: dict[Any, dict[str, _Found]], network: str, path: Path
) -> None:
    for variables in surplus.values():
        name, array = next(iter(variables.values()))
        other = ": one norm's weights do not fit the other; build the network with the file's norm"
        raise ValueError(
            f"{path} has {name} of shape {array.shape}; {network} expects {len(targets)} {kind} layers"
            f"{other if kind in _NORMS and not targets else ''}"
        )


def _check(found: _Matches, network: str, path: Path) -> None:
    """Check names and shapes, fill in gamma if the file has none, convert arrays to floats."""
    has_gamma = any("gamma" in variables for variables in found.values())
    for layer, variables in found.items():
        for variable in layer.variables:
            shape = layer.shape(variable)
            if variable == "gamma" and not has_gamma:
                variables[variable] = _Found(variable, np.ones(shape))
            if variable not in variables:
                raise ValueError(f"{path} has no {layer.name}/{variable}; {network} expects it with shape {shape}")
            name, array = variables[variable]
            if array.shape != shape or array.dtype.kind not in "fiu":
                raise ValueError(
                    f"{path} has {name} of shape {array.shape} and {array.dtype}; {network} expects numbers of "
                    f"shape {shape}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"{path} has {name} with values that are not finite; {network} expects numbers")
            if variable == "moving_variance" and (array < 0).any():
                raise ValueError(f"{path} has {name} with negative values; {network} expects variances")
            variables[variable] = _Found(
                name, np.asarray(array, np.float64 if array.dtype.itemsize > 4 else np.float32)
            )
            if isinstance(layer.module, _Blur) and not np.allclose(array, layer.module.weight.permute(2, 3, 0, 1)):
                raise ValueError(
                    f"{path} has another filter than the outer square of [1, 2, 1] / 4 in {name}; {network} cannot "
                    "train that one"
                )
        for name, array in [variables[variable] for variable in variables if variable not in layer.variables]:
            expected = ", ".join(layer.variables)
            raise ValueError(
                f"{path} has {name} of shape {array.shape}; {network} expects only {expected} of that layer"
            )


def _fold_scales(found: _Matches, path: Path) -> None:
    """Fold alpha = mean|W| into the norms: gamma (alpha x - m) = (gamma alpha) (x - m / alpha)."""
    norms = {layer.module: variables for layer, variables in found.items()}
    for layer, variables in found.items():
        if not isinstance(layer.module, QuantConv2d | QuantLinear):
            continue
        name, array = variables["kernel"]
        if not isinstance(layer.norm, BatchNorm):
            raise ValueError(
                f"the scales of {name} of shape {array.shape} in {path} have no BatchNorm to go into: another norm "
                'follows; expected a network with norm="batch", or scales="none"'
            )
        alpha = np.abs(array).mean(axis=tuple(range(array.ndim - 1)), dtype=np.float64)
        if not (alpha > 0).all():
            raise ValueError(
                f"output filter {int((alpha > 0).argmin())} of {name} of shape {array.shape} in {path} has mean|W| = "
                f"{alpha[(alpha > 0).argmin()]}; a scale must be above 0"
            )
        norm = norms[layer.norm]
        norm["moving_mean"] = _Found(norm["moving_mean"].name, norm["moving_mean"].array / alpha)
        if "gamma" in norm:
            norm["gamma"] = _Found(norm["gamma"].name, norm["gamma"].array * alpha)
        else:  # var' + eps = (var + eps) / alpha^2; larq clips |W| to 1, so var' >= var
            eps = layer.norm.eps
            variance = (norm["moving_variance"].array.astype(np.float64) + eps) / alpha**2 - eps
            norm["moving_variance"] = _Found(norm["moving_variance"].name, variance)
