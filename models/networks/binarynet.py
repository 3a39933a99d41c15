"""BinaryNet: a VGG-like network for CIFAR-10 whose weights are all binary.

Courbariaux et al., "Binarized Neural Networks: Training Deep Neural Networks with Weights and
Activations Constrained to +1 or -1", arXiv 1602.02830. Layers and constants follow the code
published with Bop2ndOrder (arXiv 2104.05124): every layer is convolution -> pool -> norm, and the
first layer sees the real image. BatchNorms learn only an offset (3,850 values); LayerNorms, from
the code's master branch, a factor and an offset (7,700).
"""

import functools
from typing import Any, Literal

from torch import nn

from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.quantizers import Binarizer, Quantizer, quantizer_of
from bitfleet.models.layers.real_layers import Norm, normalization
from bitfleet.models.networks.plain_net import PlainNet
from bitfleet.models.registry import check_sizes, model_options, register_model


def _norm(kind: Norm, num_channels: int) -> nn.Module:
    return normalization(kind, num_channels, momentum=0.99, eps=1e-3, scale=kind != "batch")


def _dense(kind: Norm, quantizer: Quantizer, in_features: int, out_features: int) -> list[nn.Module]:
    return [QuantLinear(in_features, out_features, input_quantizer=quantizer), _norm(kind, out_features)]


class BinaryNet(PlainNet):
    """BinaryNet for images of 32x32 pixels.

    Args:
        num_classes: number of classes.
        norm: "batch" or "layer".
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".
        width: channels of the first two convolutions; the next ones have 2 and 4 times, the dense
            layers 8 times as many. The paper's network has 128.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        norm: Norm = "batch",
        in_chans: int = 3,
        binarizer: Binarizer = "ste",
        width: int = 128,
    ) -> None:
        check_sizes(width)
        quantizer = quantizer_of(binarizer)

        def conv(
            in_channels: int,
            out_channels: int,
            *,
            pool: bool = False,
            padding: Literal["same", "valid"] = "same",
            first: bool = False,
        ) -> list[nn.Module]:
            input_quantizer = None if first else quantizer
            layer = QuantConv2d(in_channels, out_channels, 3, padding=padding, input_quantizer=input_quantizer)
            return [layer, *([nn.MaxPool2d(2)] if pool else []), _norm(norm, out_channels)]

        features = nn.Sequential(
            *conv(in_chans, width, padding="valid", first=True),
            *conv(width, width, pool=True),
            *conv(width, 2 * width),
            *conv(2 * width, 2 * width, pool=True),
            *conv(2 * width, 4 * width),
            *conv(4 * width, 4 * width, pool=True),
        )
        dense = functools.partial(_dense, norm, quantizer)
        super().__init__(
            "binarynet",
            features,
            [nn.Flatten(), *dense(4 * width * 3 * 3, 8 * width), *dense(8 * width, 8 * width)],
            functools.partial(dense, 8 * width),
            num_features=8 * width,
            num_classes=num_classes,
            image_size=32,
            feature_size=3,
        )


@register_model
def binarynet(pretrained: bool = False, **options: Any) -> BinaryNet:
    """BinaryNet for 32x32 images.

    | optimizer               | CIFAR-10 top-1 | source                   |
    |-------------------------|----------------|--------------------------|
    | Bop2ndOrder, 500 epochs | 91.9 %         | code of arXiv 2104.05124 |
    | ... bias-corrected      | 91.4 %         | code of arXiv 2104.05124 |
    | Bop, 500 epochs         | 91.3 %         | arXiv 1906.02107         |
    | latent weights, Adam    | 90.9 %         | arXiv 1906.02107         |

    | width | parameters | of them 1-bit | 1-bit MACs  | 32-bit MACs |
    |-------|------------|---------------|-------------|-------------|
    | 128   | 10,355,850 | 10,352,000    | 510,961,664 | 3,110,400   |
    | 32    | 650,538    | 649,568       | 31,937,024  | 777,600     |

    With norm "layer": 10,359,700 parameters, of them 7,700 in full precision.

    Args:
        pretrained: must be False.
        options: arguments of `BinaryNet`.
    """
    return BinaryNet(**model_options("binarynet", pretrained, options))
