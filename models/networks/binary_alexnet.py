"""BinaryAlexNet: an AlexNet whose weights are all binary, like BinaryNet's.

Hubara et al., "Binarized Neural Networks", NIPS 2016. Layers and constants follow larq-zoo 2.4.0
(literature/binary_alex_net.py), whose kernels are the signs of latent weights (kept within +-1)
without scale: logits and the gradients of all other parameters are equal, the gradient of a binary
weight is that of a latent weight within +-1. The first layer sees the real image.
"""

import functools
from typing import Any

from torch import nn

from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.quantizers import Binarizer, Quantizer, quantizer_of
from bitfleet.models.layers.real_layers import BatchNorm
from bitfleet.models.networks.plain_net import PlainNet
from bitfleet.models.registry import model_options, register_model


def _norm(num_channels: int) -> BatchNorm:
    return BatchNorm(num_channels, momentum=0.9, eps=1e-3, scale=False)


def _dense(quantizer: Quantizer, in_features: int, out_features: int) -> list[nn.Module]:
    return [QuantLinear(in_features, out_features, input_quantizer=quantizer), _norm(out_features)]


class BinaryAlexNet(PlainNet):
    """BinaryAlexNet for images of 224x224 pixels.

    Args:
        num_classes: number of classes.
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".
    """

    def __init__(self, *, num_classes: int = 1000, in_chans: int = 3, binarizer: Binarizer = "ste") -> None:
        quantizer = quantizer_of(binarizer)

        def conv(in_channels: int, out_channels: int, kernel_size: int, *, pool: bool = False) -> list[nn.Module]:
            layer = QuantConv2d(in_channels, out_channels, kernel_size, input_quantizer=quantizer)
            return [layer, *([nn.MaxPool2d(3, 2)] if pool else []), _norm(out_channels)]

        features = nn.Sequential(
            QuantConv2d(in_chans, 64, 11, 4, input_quantizer=None),
            nn.MaxPool2d(3, 2),
            _norm(64),
            *conv(64, 192, 5, pool=True),
            *conv(192, 384, 3),
            *conv(384, 384, 3),
            *conv(384, 256, 3, pool=True),
        )
        dense = functools.partial(_dense, quantizer)
        super().__init__(
            "binary_alexnet",
            features,
            [nn.Flatten(), *dense(256 * 6 * 6, 4096), *dense(4096, 4096)],
            functools.partial(dense, 4096),
            num_features=4096,
            num_classes=num_classes,
            image_size=224,
            feature_size=6,
        )


@register_model
def binary_alexnet(pretrained: bool = False, **options: Any) -> BinaryAlexNet:
    """BinaryAlexNet for 224x224 images.

    | optimizer                  | top-1  | source         |
    |----------------------------|--------|----------------|
    | latent weights, 150 epochs | 36.3 % | larq-zoo 2.4.0 |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 61,838,248 | 61,827,776    | 768,512,000   | 72,855,552  |

    Args:
        pretrained: must be False.
        options: arguments of `BinaryAlexNet`.
    """
    return BinaryAlexNet(**model_options("binary_alexnet", pretrained, options))
