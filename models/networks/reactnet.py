"""ReActNet: learned thresholds before the signs, learned shifts in the activations.

Liu et al., "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions",
ECCV 2020, arXiv 2003.03488. ReActNet-18 is a Bi-Real Net 18 with them, ReActNet-A a MobileNet.
Layers and constants follow the published code (github.com/liuzechun/ReActNet): symmetric padding,
zeros padded after the sign. What differs from it:

- A weight is +-1. There, a real weight stands for its sign times mean|W| of its filter. The
  BatchNorm after each binary convolution divides that scale out: only its running statistics differ
  (`official_weights.py` converts them), and logits in evaluation are equal. In training its eps
  there is one of eps / mean|W|^2 here, which matters for mean|W| below 0.01.
- The gradient of a weight here is mean|W| times that there, and not 0 for |W| above 1.
- sign(0) is +1, not 0.
- Weights start with random signs. The published ones start from stage 1, or all at +1.
- The two 1x1 convolutions that double the channels of ReActNet-A are one with twice the filters.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.quantizers import Binarizer, Quantizer, quantizer_of
from bitfleet.models.layers.real_layers import BatchNorm, ChannelBias, RPReLU, SameAvgPool2d, glorot_normal_
from bitfleet.models.networks.residual_net import ResidualNet, Stage
from bitfleet.models.registry import check_sizes, model_options, register_model


def _norm(num_channels: int) -> BatchNorm:
    return BatchNorm(num_channels, momentum=0.9, eps=1e-5)


class Binary(nn.Module):
    """Threshold per channel -> sign -> binary convolution -> norm."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, quantizer: Quantizer
    ) -> None:
        super().__init__()
        self.threshold = ChannelBias(in_channels)
        self.conv = QuantConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            input_quantizer=quantizer,
            initializer=glorot_normal_,
        )
        self.norm = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.norm(self.conv(self.threshold(x)))
        return normalized


class _Block(nn.Module):
    """A binary 3x3 convolution, plus the shortcut, then the activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, quantizer: Quantizer) -> None:
        super().__init__()
        self.binary = Binary(in_channels, out_channels, 3, stride, quantizer)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(
                SameAvgPool2d(2, stride) if stride > 1 else nn.Identity(),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                _norm(out_channels),
            )
        )
        self.activation = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut last, as in a Bi-Real Net.
        convolved = self.binary(x)
        activated: Tensor = self.activation(convolved + self.shortcut(x))
        return activated


class ReActNet(ResidualNet):
    """ReActNet-18, of any width and depth.

    Args:
        width: channels of the stem and the first stage; each later stage doubles them.
        depths: binary convolutions per stage. All stages but the first halve the resolution.
        stem: "imagenet" (7x7 convolution and 3x3 max pool, both stride 2) or "small" for images of
            28 to 32 pixels (3x3 convolution, 2x2 max pool).
        num_classes: number of classes.
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".

    Raises:
        ValueError: an unknown option, or a width or depth below 1.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        depths: tuple[int, ...] = (4, 4, 4, 4),
        stem: Literal["imagenet", "small"] = "imagenet",
        num_classes: int = 1000,
        in_chans: int = 3,
        binarizer: Binarizer = "approx",
    ) -> None:
        check_sizes(width, depths)
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem is {stem!r}; expected "imagenet" or "small"')
        large = stem == "imagenet"
        layers = nn.Sequential(
            nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
            if large
            else nn.Conv2d(in_chans, width, 3, 1, 1, bias=False),
            _norm(width),
            nn.MaxPool2d(3, 2, 1) if large else nn.MaxPool2d(2),
        )
        quantizer, channels = quantizer_of(binarizer), width
        stages = []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Block(channels, width * 2**stage, stride, quantizer))
                channels = width * 2**stage
            stages.append(Stage(blocks=blocks, channels=channels, reduction=(4 if large else 2) * 2**stage))
        super().__init__(layers, stages, num_classes=num_classes)


class _Separable(nn.Module):
    """A binary 3x3 and a binary 1x1 convolution, each plus a shortcut, then an activation.

    The 1x1 convolution may double the channels; its shortcut then repeats them.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, quantizer: Quantizer) -> None:
        super().__init__()
        assert out_channels in (in_channels, 2 * in_channels)
        self.doubles = out_channels > in_channels
        self.spatial = Binary(in_channels, in_channels, 3, stride, quantizer)
        self.pool = SameAvgPool2d(2, 2) if stride == 2 else nn.Identity()
        self.spatial_activation = RPReLU(in_channels)
        self.pointwise = Binary(in_channels, out_channels, 1, 1, quantizer)
        self.pointwise_activation = RPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.spatial(x)
        x = self.spatial_activation(convolved + self.pool(x))
        convolved = self.pointwise(x)
        activated: Tensor = self.pointwise_activation(convolved + (torch.cat((x, x), 1) if self.doubles else x))
        return activated


class ReActNetA(ResidualNet):
    """ReActNet-A: the channels of MobileNet, but full 3x3 convolutions instead of depthwise ones.

    Args:
        width: channels of the stem; the stages have 2, 4, 8, 16 and 32 times as many.
        num_classes: number of classes.
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".

    Raises:
        ValueError: an unknown option, or a width below 1.
    """

    def __init__(
        self, *, width: int = 32, num_classes: int = 1000, in_chans: int = 3, binarizer: Binarizer = "approx"
    ) -> None:
        check_sizes(width)
        stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, 2, 1, bias=False), _norm(width))
        quantizer, channels = quantizer_of(binarizer), width
        stages = []
        for factor, depth in ((2, 1), (4, 2), (8, 2), (16, 6), (32, 2)):
            blocks = []
            for index in range(depth):
                stride = 2 if factor > 2 and index == 0 else 1
                blocks.append(_Separable(channels, width * factor, stride, quantizer))
                channels = width * factor
            stages.append(Stage(blocks=blocks, channels=channels, reduction=factor))
        super().__init__(stem, stages, num_classes=num_classes)


@register_model
def reactnet18(pretrained: bool = False, **options: Any) -> ReActNet:
    """ReActNet-18 for 224x224 images.

    | optimizer                                       | top-1  | source                   |
    |-------------------------------------------------|--------|--------------------------|
    | latent weights, 2 stages of 256 epochs, teacher | 65.9 % | code of arXiv 2003.03488 |
    | ... its scripts of 128 epochs, run by a user    | 63.2 % | issue 29 of that code    |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 11,704,424 | 10,985,472    | 1,676,279,808 | 137,793,536 |

    Args:
        pretrained: must be False.
        options: arguments of `ReActNet`.
    """
    return ReActNet(**model_options("reactnet18", pretrained, options))


@register_model
def reactnet_small(pretrained: bool = False, **options: Any) -> ReActNet:
    """`birealnet_small` with the blocks of a ReActNet, for images of 28 to 32 pixels.

    | parameters | of them 1-bit | 1-bit MACs (32x32) | 32-bit MACs |
    |------------|---------------|--------------------|-------------|
    | 78,890     | 73,728        | 2,949,120          | 508,544     |

    Args:
        pretrained: must be False.
        options: arguments of `ReActNet`.
    """
    defaults = {"width": 16, "depths": (2, 2, 2), "stem": "small", "num_classes": 10}
    return ReActNet(**model_options("reactnet_small", pretrained, options, **defaults))


@register_model
def reactnet_a(pretrained: bool = False, **options: Any) -> ReActNetA:
    """ReActNet-A for 224x224 images.

    | optimizer                                       | top-1  | source                   |
    |-------------------------------------------------|--------|--------------------------|
    | latent weights, 2 stages of 256 epochs, teacher | 69.4 % | arXiv 2003.03488         |
    | ... with another weight decay (AdamBNN)         | 70.5 % | arXiv 2106.11309         |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 29,343,592 | 28,253,184    | 4,816,896,000 | 11,862,016  |

    Args:
        pretrained: must be False.
        options: arguments of `ReActNetA`.
    """
    return ReActNetA(**model_options("reactnet_a", pretrained, options))
