"""Bi-Real Net: a binary ResNet with a real-valued shortcut around every binary convolution.

Liu et al., "Bi-Real Net: Enhancing the Performance of 1-bit CNNs With Improved Representational
Capability and Advanced Training Algorithm", ECCV 2018, arXiv 1808.00278. Layers and constants
follow the code published with Bop2ndOrder (Suarez- Ramirez et al., arXiv 2104.05124), whose
convolutions have neither weight scales nor biases.
"""

from typing import Any, Literal

from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.quantizers import Binarizer, Quantizer, quantizer_of
from bitfleet.models.layers.real_layers import (
    Norm,
    SameAvgPool2d,
    SameConv2d,
    SameMaxPool2d,
    glorot_normal_,
    glorot_uniform_,
    normalization,
)
from bitfleet.models.networks.residual_net import ResidualNet, Stage
from bitfleet.models.registry import check_sizes, model_options, register_model

Residual = Literal["single", "double"]


def _norm(kind: Norm, num_channels: int, gain: float = 1.0) -> nn.Module:
    return normalization(kind, num_channels, momentum=0.8, eps=1e-3, gain=gain)


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        SameAvgPool2d(2, stride) if stride > 1 else nn.Identity(),
        SameConv2d(in_channels, out_channels, 1, initializer=glorot_normal_),
        _norm(norm, out_channels),
    )


class _Block(nn.Module):
    """sign -> binary 3x3 convolution -> norm, plus the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm, quantizer: Quantizer) -> None:
        super().__init__()
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm)
        self.conv = QuantConv2d(
            in_channels, out_channels, 3, stride, input_quantizer=quantizer, initializer=glorot_normal_
        )
        # The inverse of the standard deviation of a sum of 9 * in_channels signs.
        self.norm = _norm(norm, out_channels, gain=(9 * in_channels) ** -0.5)

    def convolved(self, x: Tensor) -> Tensor:
        """Apply the block without its shortcut."""
        normalized: Tensor = self.norm(self.conv(x))
        return normalized

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut last: DeepSpeed's zero3 hooks every module and sums gradients in the order of
        # their calls.
        convolved = self.convolved(x)
        shortcut: Tensor = self.shortcut(x)
        return convolved + shortcut


class _Pair(nn.Module):
    """Two convolutions within one shortcut, as in ResNet, but with a sign instead of ReLU."""

    def __init__(self, first: _Block, second: _Block) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.second.convolved(self.first.convolved(x))
        shortcut: Tensor = self.first.shortcut(x)
        return convolved + shortcut


class BiRealNet(ResidualNet):
    """Bi-Real Net of any width and depth.

    Args:
        width: channels of the stem and the first stage; each later stage doubles them.
        depths: binary convolutions per stage. All stages but the first halve the resolution.
        stem: "imagenet" (7x7 convolution and 3x3 max pool, both stride 2) or "small" for images of
            28 to 32 pixels (3x3 convolution, 2x2 max pool).
        num_classes: number of classes.
        norm: "batch", "layer", or "none": a learned factor (initially 1 / sqrt(fan in) after a
            binary convolution) and offset.
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".
        residual: "double": a shortcut around each binary convolution. "single": around each two of
            them, as in ResNet.

    Raises:
        ValueError: an unknown option, a width or depth below 1, or `residual="single"` with an odd
            number in `depths`.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        depths: tuple[int, ...] = (4, 4, 4, 4),
        stem: Literal["imagenet", "small"] = "imagenet",
        num_classes: int = 1000,
        norm: Norm = "batch",
        in_chans: int = 3,
        binarizer: Binarizer = "approx",
        residual: Residual = "double",
    ) -> None:
        check_sizes(width, depths)
        if residual not in ("single", "double"):
            raise ValueError(f'residual is {residual!r}; expected "single" or "double"')
        if residual == "single" and any(depth % 2 for depth in depths):
            raise ValueError(
                f'depths are {depths}; residual="single" pairs the convolutions of a stage: expected even numbers'
            )
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem is {stem!r}; expected "imagenet" or "small"')
        large = stem == "imagenet"
        layers = nn.Sequential(
            SameConv2d(in_chans, width, 7 if large else 3, 2 if large else 1, initializer=glorot_normal_),
            _norm(norm, width),
            SameMaxPool2d(3 if large else 2, 2),
        )
        quantizer, channels = quantizer_of(binarizer), width
        stages = []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Block(channels, width * 2**stage, stride, norm, quantizer))
                channels = width * 2**stage
            pairs = [_Pair(first, second) for first, second in zip(blocks[::2], blocks[1::2], strict=False)]
            modules = blocks if residual == "double" else pairs
            stages.append(Stage(blocks=modules, channels=channels, reduction=(4 if large else 2) * 2**stage))
        super().__init__(layers, stages, num_classes=num_classes, initializer=glorot_uniform_)
        self.residual = residual


@register_model
def birealnet18(pretrained: bool = False, **options: Any) -> BiRealNet:
    """Bi-Real Net 18 for 224x224 images.

    | optimizer               | top-1  | source                   |
    |-------------------------|--------|--------------------------|
    | Bop2ndOrder, 150 epochs | 57.2 % | code of arXiv 2104.05124 |
    | Bop, 300 epochs         | 56.6 % | code of arXiv 1906.02107 |
    | latent weights          | 56.4 % | arXiv 1808.00278         |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 11,689,512 | 10,985,472    | 1,676,279,808 | 137,793,536 |

    Args:
        pretrained: must be False.
        options: arguments of `BiRealNet`.
    """
    return BiRealNet(**model_options("birealnet18", pretrained, options))


@register_model
def birealnet34(pretrained: bool = False, **options: Any) -> BiRealNet:
    """Bi-Real Net 34 for 224x224 images.

    | optimizer      | top-1  | source           |
    |----------------|--------|------------------|
    | latent weights | 62.2 % | arXiv 1808.00278 |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 21,797,672 | 21,086,208    | 3,525,967,872 | 137,793,536 |

    Args:
        pretrained: must be False.
        options: arguments of `BiRealNet`.
    """
    return BiRealNet(**model_options("birealnet34", pretrained, options, depths=(6, 8, 12, 6)))


@register_model
def birealnet_small(pretrained: bool = False, **options: Any) -> BiRealNet:
    """Six binary convolutions for images of 28 to 32 pixels; not from any paper.

    | parameters | of them 1-bit | 1-bit MACs (32x32) | 32-bit MACs |
    |------------|---------------|--------------------|-------------|
    | 78,042     | 73,728        | 2,949,120          | 508,544     |

    Args:
        pretrained: must be False.
        options: arguments of `BiRealNet`.
    """
    defaults = {"width": 16, "depths": (2, 2, 2), "stem": "small", "num_classes": 10}
    return BiRealNet(**model_options("birealnet_small", pretrained, options, **defaults))
