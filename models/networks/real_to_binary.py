"""Real-to-Binary: a ResNet whose binary convolutions are scaled by what the image holds.

Martinez et al., "Training Binary Neural Networks with Real-to-Binary Convolutions", ICLR 2020,
arXiv 2003.11535. Layers and constants follow larq-zoo 2.4.0 (literature/real_to_bin_nets.py,
RealToBinNetBNN). Kernels there are the signs of latent weights (kept within +-1) without scale; the
factor per image and channel is a small network of float parameters, here as there. So logits and
the gradients of all other parameters are equal, the gradient of a binary weight is that of a latent
weight within +-1.
"""

from typing import Any

from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.quantizers import Binarizer, Quantizer, quantizer_of
from bitfleet.models.layers.real_layers import (
    BatchNorm,
    SameAvgPool2d,
    SameConv2d,
    SameMaxPool2d,
    glorot_normal_,
    glorot_uniform_,
    he_normal_,
)
from bitfleet.models.networks.residual_net import ResidualNet, Stage
from bitfleet.models.registry import check_sizes, model_options, register_model


def _norm(num_channels: int) -> BatchNorm:
    return BatchNorm(num_channels, momentum=0.99, eps=1e-3)


class _Factors(nn.Module):
    """A factor in (0, 1) per image and channel: mean -> linear -> ReLU -> linear -> sigmoid."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_channels, in_channels // 8, bias=False)
        self.expand = nn.Linear(in_channels // 8, out_channels, bias=False)
        he_normal_(self.reduce.weight)
        he_normal_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, 1, 1]."""
        factors: Tensor = self.expand(self.reduce(x.mean((2, 3))).relu()).sigmoid()
        return factors[:, :, None, None]


class _Block(nn.Module):
    """norm -> sign -> binary 3x3 convolution, times the factors -> PReLU, plus the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, quantizer: Quantizer) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            conv = SameConv2d(in_channels, out_channels, 1, initializer=glorot_normal_)
            self.shortcut = nn.Sequential(SameAvgPool2d(2, 2), conv, _norm(out_channels))
        self.norm = _norm(in_channels)
        self.conv = QuantConv2d(
            in_channels, out_channels, 3, stride, input_quantizer=quantizer, initializer=glorot_normal_
        )
        self.factors = _Factors(in_channels, out_channels)
        self.activation = nn.PReLU(out_channels, init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut last, as in a Bi-Real Net.
        normalized = self.norm(x)
        activated: Tensor = self.activation(self.conv(normalized) * self.factors(normalized))
        shortcut: Tensor = self.shortcut(x)
        return activated + shortcut


class RealToBinary(ResidualNet):
    """Real-to-Binary network of any width and depth.

    Args:
        width: channels of the stem and the first stage, at least 8; each later stage doubles them.
        depths: binary convolutions per stage. All stages but the first halve the resolution.
        num_classes: number of classes.
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".

    Raises:
        ValueError: an unknown option, a width below 8 or a depth below 1.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        depths: tuple[int, ...] = (4, 4, 4, 4),
        num_classes: int = 1000,
        in_chans: int = 3,
        binarizer: Binarizer = "ste",
    ) -> None:
        check_sizes(width, depths, least_width=8)
        stem = nn.Sequential(
            SameConv2d(in_chans, width, 7, 2, initializer=glorot_normal_),
            _norm(width),
            nn.PReLU(width, init=0.0),
            SameMaxPool2d(3, 2),
        )
        quantizer, channels = quantizer_of(binarizer), width
        stages = []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Block(channels, width * 2**stage, stride, quantizer))
                channels = width * 2**stage
            stages.append(Stage(blocks=blocks, channels=channels, reduction=4 * 2**stage))
        super().__init__(stem, stages, num_classes=num_classes, initializer=glorot_uniform_)


@register_model
def real_to_binary(pretrained: bool = False, **options: Any) -> RealToBinary:
    """Real-to-Binary network for 224x224 images.

    | optimizer                         | top-1  | source           |
    |-----------------------------------|--------|------------------|
    | latent weights, 4 stages, teacher | 65.4 % | arXiv 2003.11535 |
    | ... in larq-zoo                   | 65.0 % | larq-zoo 2.4.0   |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 11,986,920 | 10,985,472    | 1,676,279,808 | 138,087,936 |

    Args:
        pretrained: must be False.
        options: arguments of `RealToBinary`.
    """
    return RealToBinary(**model_options("real_to_binary", pretrained, options))
