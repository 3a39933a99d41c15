"""BinaryResNetE: a ResNet with a shortcut around every binary convolution and a wide sign gradient.

Bethge et al., "Back to Simplicity: How to Train Accurate BNNs from Scratch?", arXiv 1906.08637.
Layers and constants follow larq-zoo 2.4.0 (literature/resnet_e.py), whose kernels are the signs of
latent weights (kept within +-1.25) without scale: logits and the gradients of all other parameters
are equal, the gradient of a binary weight is that of a latent weight within +-1.25.
"""

from typing import Any, Literal

from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.quantizers import Binarizer, Quantizer, quantizer_of
from bitfleet.models.layers.real_layers import BatchNorm, SameConv2d, SameMaxPool2d, glorot_normal_, he_normal_
from bitfleet.models.networks.residual_net import ResidualNet, Stage
from bitfleet.models.registry import check_sizes, model_options, register_model


def _norm(num_channels: int) -> BatchNorm:
    return BatchNorm(num_channels, momentum=0.9, eps=1e-5)


class _Block(nn.Module):
    """sign -> binary 3x3 convolution -> norm, plus the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, quantizer: Quantizer) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            conv = SameConv2d(in_channels, out_channels, 1, initializer=glorot_normal_)
            self.shortcut = nn.Sequential(nn.AvgPool2d(2), conv, _norm(out_channels))
        self.conv = QuantConv2d(
            in_channels, out_channels, 3, stride, input_quantizer=quantizer, initializer=glorot_normal_
        )
        self.norm = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut last, as in a Bi-Real Net.
        convolved: Tensor = self.norm(self.conv(x))
        shortcut: Tensor = self.shortcut(x)
        return convolved + shortcut


class BinaryResNetE(ResidualNet):
    """BinaryResNetE of any width and depth.

    Args:
        width: channels of the stem and the first stage; each later stage doubles them.
        depths: binary convolutions per stage. All stages but the first halve the resolution.
        stem: "imagenet" (7x7 convolution and 3x3 max pool, both stride 2) or "small" for images of
            less than 50 pixels (3x3 convolution).
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
        binarizer: Binarizer = "wide_ste",
    ) -> None:
        check_sizes(width, depths)
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem is {stem!r}; expected "imagenet" or "small"')
        layers = nn.Sequential(SameConv2d(in_chans, width, 3, initializer=he_normal_))
        if stem == "imagenet":
            layers = nn.Sequential(
                SameConv2d(in_chans, width, 7, 2, initializer=he_normal_),
                _norm(width),
                nn.ReLU(inplace=True),
                SameMaxPool2d(3, 2),
                _norm(width),
            )
        quantizer, channels = quantizer_of(binarizer), width
        stages = []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Block(channels, width * 2**stage, stride, quantizer))
                channels = width * 2**stage
            stages.append(
                Stage(blocks=blocks, channels=channels, reduction=(4 if stem == "imagenet" else 1) * 2**stage)
            )
        super().__init__(layers, stages, num_classes=num_classes, initializer=glorot_normal_, relu=True)


@register_model
def binary_resnet_e18(pretrained: bool = False, **options: Any) -> BinaryResNetE:
    """BinaryResNetE-18 for 224x224 images.

    | optimizer                  | top-1  | source         |
    |----------------------------|--------|----------------|
    | latent weights, 120 epochs | 58.3 % | larq-zoo 2.4.0 |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 11,689,640 | 10,985,472    | 1,676,279,808 | 137,793,536 |

    Args:
        pretrained: must be False.
        options: arguments of `BinaryResNetE`.
    """
    return BinaryResNetE(**model_options("binary_resnet_e18", pretrained, options))
