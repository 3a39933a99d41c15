"""BinaryAlexNet: an AlexNet whose weights are all binary, like BinaryNet's.

Hubara et al., "Binarized Neural Networks", NIPS 2016. Layers and constants follow larq-zoo 2.4.0
(literature/binary_alex_net.py), whose kernels are the signs of latent weights (kept within +-1)
without scale: logits and the gradients of all other parameters are equal, the gradient of a binary
weight is that of a latent weight within +-1. The first layer sees the real image.
"""

from typing import Any

from torch import Tensor, nn

from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.quantizers import Binarizer, quantizer_of
from bitfleet.models.layers.real_layers import BatchNorm
from bitfleet.models.registry import model_options, register_model


def _norm(num_channels: int) -> BatchNorm:
    return BatchNorm(num_channels, momentum=0.9, eps=1e-3, scale=False)


class BinaryAlexNet(nn.Module):
    """BinaryAlexNet for images of 224x224 pixels.

    Args:
        num_classes: number of classes.
        in_chans: channels of the images.
        binarizer: quantizer of the features: "ste", "wide_ste", "approx" or "hardtanh_tanh".
    """

    compiled_apart = ("features", "classifier")
    """Compiled separately: gradients of the classifier travel during backward of the features."""

    def __init__(self, *, num_classes: int = 1000, in_chans: int = 3, binarizer: Binarizer = "ste") -> None:
        super().__init__()
        self.num_classes = num_classes
        quantizer = quantizer_of(binarizer)

        def conv(in_channels: int, out_channels: int, kernel_size: int, *, pool: bool = False) -> list[nn.Module]:
            layer = QuantConv2d(in_channels, out_channels, kernel_size, input_quantizer=quantizer)
            return [layer, *([nn.MaxPool2d(3, 2)] if pool else []), _norm(out_channels)]

        self.features = nn.Sequential(
            QuantConv2d(in_chans, 64, 11, 4, input_quantizer=None),
            nn.MaxPool2d(3, 2),
            _norm(64),
            *conv(64, 192, 5, pool=True),
            *conv(192, 384, 3),
            *conv(384, 384, 3),
            *conv(384, 256, 3, pool=True),
        )
        layers: list[nn.Module] = [nn.Flatten()]
        for in_features, out_features in ((256 * 6 * 6, 4096), (4096, 4096), (4096, num_classes)):
            layers.append(QuantLinear(in_features, out_features, input_quantizer=quantizer))
            layers.append(_norm(out_features))
        self.classifier = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, 224, 224] -> logits [N, num_classes]."""
        features: Tensor = self.features(x)
        if features.shape[2:] != (6, 6):
            raise ValueError(f"binary_alexnet got images of {x.shape[2]}x{x.shape[3]} pixels; expected 224x224")
        logits: Tensor = self.classifier(features)
        return logits


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
