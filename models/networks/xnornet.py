"""XNOR-Net: AlexNet with batch normalization and sign before every binary convolution.

Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
ECCV 2016, arXiv 1603.05279. Layers and constants follow the code published with Bop2ndOrder (arXiv
2104.05124): no weight scales, biases or dropout, and zeros padded after the sign.
"""

import functools
from typing import Any, Literal

from torch import nn

from bitfleet.models.layers.layers import QuantConv2d
from bitfleet.models.layers.quantizers import Binarizer, quantizer_of
from bitfleet.models.layers.real_layers import Norm, SameConv2d, glorot_uniform_, normalization
from bitfleet.models.networks.plain_net import PlainNet
from bitfleet.models.registry import model_options, register_model


def _last_layers(num_features: int, num_classes: int) -> list[nn.Module]:
    layer = nn.Linear(num_features, num_classes, bias=False)
    glorot_uniform_(layer.weight)
    return [layer]


class XNORNet(PlainNet):
    """XNOR-Net for images of 224x224 pixels.

    Args:
        num_classes: number of classes.
        norm: "batch" or "layer".
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".
    """

    def __init__(
        self, *, num_classes: int = 1000, norm: Norm = "batch", in_chans: int = 3, binarizer: Binarizer = "ste"
    ) -> None:
        quantizer = quantizer_of(binarizer)

        def conv(
            in_channels: int, out_channels: int, kernel_size: int, padding: Literal["same", "valid"] = "same"
        ) -> list[nn.Module]:
            layer = QuantConv2d(in_channels, out_channels, kernel_size, padding=padding, input_quantizer=quantizer)
            return [normalization(norm, in_channels, momentum=0.9, eps=1e-4), layer]

        features = nn.Sequential(
            SameConv2d(in_chans, 96, 11, 4),
            normalization(norm, 96, momentum=0.9, eps=1e-5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            *conv(96, 256, 5),
            nn.MaxPool2d(3, 2),
            *conv(256, 384, 3),
            *conv(384, 384, 3),
            *conv(384, 256, 3),
            nn.MaxPool2d(3, 2),
        )
        hidden = [
            *conv(256, 4096, 6, "valid"),
            *conv(4096, 4096, 1, "valid"),
            normalization(norm, 4096, momentum=0.9, eps=1e-3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        ]
        super().__init__(
            "xnornet",
            features,
            hidden,
            functools.partial(_last_layers, 4096),
            num_features=4096,
            num_classes=num_classes,
            image_size=224,
            feature_size=6,
        )


@register_model
def xnornet(pretrained: bool = False, **options: Any) -> XNORNet:
    """XNOR-Net for 224x224 images.

    | optimizer               | top-1  | source                   |
    |-------------------------|--------|--------------------------|
    | Bop2ndOrder, 100 epochs | 46.9 % | code of arXiv 2104.05124 |
    | Bop, 100 epochs         | 45.9 % | code of arXiv 1906.02107 |
    | latent weights          | 44.2 % | arXiv 1603.05279         |

    | parameters | of them 1-bit | 1-bit MACs    | 32-bit MACs |
    |------------|---------------|---------------|-------------|
    | 62,387,104 | 58,236,928    | 1,025,744,896 | 113,379,328 |

    Args:
        pretrained: must be False.
        options: arguments of `XNORNet`.
    """
    return XNORNet(**model_options("xnornet", pretrained, options))
