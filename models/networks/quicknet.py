"""QuickNet: a residual network made for fast inference, trained in one stage without a teacher.

Bannink et al., "Larq Compute Engine: Design, Benchmark, and Deploy State-of-the-Art Binarized
Neural Networks", MLSys 2021, arXiv 2011.09398. Layers and constants follow larq-zoo 2.4.0
(sota/quicknet.py). Binary convolutions pad the signs with +1, ReLU comes before their BatchNorm,
and between stages a blurred max pool halves the resolution.

A kernel of larq-zoo is the sign of a latent weight without scale, so nothing but the latent weights
(kept within +-1.25) is missing here: logits and the gradients of all other parameters are equal,
the gradient of a binary weight is that of a latent weight within +-1.25.
"""

from typing import Any

from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.quantizers import Binarizer, Quantizer, quantizer_of
from bitfleet.models.layers.real_layers import (
    BatchNorm,
    BlurPool2d,
    SameConv2d,
    SameDepthwiseConv2d,
    glorot_normal_,
    he_normal_,
)
from bitfleet.models.networks.residual_net import ResidualNet, Stage
from bitfleet.models.registry import model_options, register_model


def _stem_norm(num_channels: int, *, affine: bool = True) -> BatchNorm:
    return BatchNorm(num_channels, momentum=0.99, eps=1e-3, scale=affine, center=affine)


def _norm(num_channels: int) -> BatchNorm:
    return BatchNorm(num_channels, momentum=0.9, eps=1e-5)


class _Block(nn.Module):
    """sign -> binary 3x3 convolution -> ReLU -> norm, plus the input."""

    def __init__(self, channels: int, quantizer: Quantizer) -> None:
        super().__init__()
        self.conv = QuantConv2d(
            channels, channels, 3, pad_value=1, input_quantizer=quantizer, initializer=glorot_normal_
        )
        self.norm = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.norm(self.conv(x).relu())
        return normalized + x


class QuickNet(ResidualNet):
    """QuickNet of any size, for images of at least 32 pixels.

    Args:
        width: channels of the first stage, a multiple of 4.
        factors: channels of each stage, in widths.
        depths: binary convolutions per stage. The stem divides the resolution by 4, each stage but
            the first by 2.
        num_classes: number of classes.
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".

    Raises:
        ValueError: an unknown option, or numbers that give no network.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        factors: tuple[int, ...] = (1, 2, 4, 8),
        depths: tuple[int, ...] = (4, 4, 4, 4),
        num_classes: int = 1000,
        in_chans: int = 3,
        binarizer: Binarizer = "wide_ste",
    ) -> None:
        if width < 1 or width % 4:
            raise ValueError(f"width is {width}; expected a multiple of 4")
        if not depths or min(depths) < 1 or len(depths) > len(factors):
            raise ValueError(f"depths are {depths}; expected 1 to {len(factors)} numbers of at least 1")
        channels = width * factors[0]
        stem = nn.Sequential(
            SameConv2d(in_chans, channels // 4, 3, 2, initializer=he_normal_),
            _stem_norm(channels // 4),
            nn.ReLU(inplace=True),
            SameDepthwiseConv2d(channels // 4, 3, 2),
            _stem_norm(channels // 4, affine=False),
            SameConv2d(channels // 4, channels, 1, initializer=he_normal_),
            _stem_norm(channels),
        )
        quantizer = quantizer_of(binarizer)
        stages = []
        for stage, (factor, depth) in enumerate(zip(factors, depths, strict=False)):
            blocks: list[nn.Module] = []
            if stage > 0:
                blocks.append(_transition(channels, width * factor))
                channels = width * factor
            blocks += [_Block(channels, quantizer) for _ in range(depth)]
            stages.append(Stage(blocks=blocks, channels=channels, reduction=4 * 2**stage))
        super().__init__(stem, stages, num_classes=num_classes, initializer=glorot_normal_, relu=True)


def _transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """Halve the resolution and change the channels."""
    return nn.Sequential(
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        BlurPool2d(),
        SameConv2d(in_channels, out_channels, 1, initializer=glorot_normal_),
        _norm(out_channels),
    )


@register_model
def quicknet_small(pretrained: bool = False, **options: Any) -> QuickNet:
    """QuickNetSmall for 224x224 images.

    | optimizer                  | top-1  | source         |
    |----------------------------|--------|----------------|
    | latent weights, 600 epochs | 59.4 % | larq-zoo 2.4.0 |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 12,652,504 | 11,980,800    | 1,156,055,040 | 15,941,120  |

    Args:
        pretrained: must be False.
        options: arguments of `QuickNet`.
    """
    return QuickNet(**model_options("quicknet_small", pretrained, options, width=32, factors=(1, 2, 8, 16)))


@register_model
def quicknet(pretrained: bool = False, **options: Any) -> QuickNet:
    """QuickNet for 224x224 images.

    | optimizer                  | top-1  | source         |
    |----------------------------|--------|----------------|
    | latent weights, 600 epochs | 63.3 % | larq-zoo 2.4.0 |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 13,230,024 | 12,533,760    | 1,849,688,064 | 29,651,712  |

    Args:
        pretrained: must be False.
        options: arguments of `QuickNet`.
    """
    return QuickNet(**model_options("quicknet", pretrained, options))


@register_model
def quicknet_large(pretrained: bool = False, **options: Any) -> QuickNet:
    """QuickNetLarge for 224x224 images.

    | optimizer                  | top-1  | source         |
    |----------------------------|--------|----------------|
    | latent weights, 600 epochs | 66.9 % | larq-zoo 2.4.0 |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 23,338,184 | 22,634,496    | 3,699,376,128 | 29,651,712  |

    Args:
        pretrained: must be False.
        options: arguments of `QuickNet`.
    """
    return QuickNet(**model_options("quicknet_large", pretrained, options, depths=(6, 8, 12, 6)))
