"""Binary networks, their layers and quantizers.

Importing this package registers the networks with timm: `timm.create_model("birealnet18",
norm="layer")`. The weight of a binary layer is itself +-1 and has the attribute `binary = True`.
"""

from bitfleet.models.compilation import compile_network
from bitfleet.models.config import ModelConfig, check_images, create_model
from bitfleet.models.keras.weights import kernel_from_keras, load_keras_weights
from bitfleet.models.layers.layers import QuantConv2d, QuantLinear
from bitfleet.models.layers.quantizers import approx_sign, hardtanh_tanh_sign, ste_sign, wide_ste_sign
from bitfleet.models.layers.real_layers import (
    BatchNorm,
    BlurPool2d,
    ChannelAffine,
    ChannelBias,
    ChannelLayerNorm,
    RPReLU,
    SameAvgPool2d,
    SameConv2d,
    SameDepthwiseConv2d,
    SameMaxPool2d,
)
from bitfleet.models.networks.binary_alexnet import BinaryAlexNet, binary_alexnet
from bitfleet.models.networks.binarynet import BinaryNet, binarynet
from bitfleet.models.networks.birealnet import BiRealNet, birealnet18, birealnet34, birealnet_small
from bitfleet.models.networks.quicknet import QuickNet, quicknet, quicknet_large, quicknet_small
from bitfleet.models.networks.reactnet import ReActNet, ReActNetA, reactnet18, reactnet_a, reactnet_small
from bitfleet.models.networks.real_to_binary import RealToBinary, real_to_binary
from bitfleet.models.networks.resnet_e import BinaryResNetE, binary_resnet_e18
from bitfleet.models.networks.xnornet import XNORNet, xnornet
from bitfleet.models.size import ModelSize, count

__all__ = [
    "BatchNorm",
    "BiRealNet",
    "BinaryAlexNet",
    "BinaryNet",
    "BinaryResNetE",
    "BlurPool2d",
    "ChannelAffine",
    "ChannelBias",
    "ChannelLayerNorm",
    "ModelConfig",
    "ModelSize",
    "QuantConv2d",
    "QuantLinear",
    "QuickNet",
    "RPReLU",
    "ReActNet",
    "ReActNetA",
    "RealToBinary",
    "SameAvgPool2d",
    "SameConv2d",
    "SameDepthwiseConv2d",
    "SameMaxPool2d",
    "XNORNet",
    "approx_sign",
    "binary_alexnet",
    "binary_resnet_e18",
    "binarynet",
    "birealnet18",
    "birealnet34",
    "birealnet_small",
    "check_images",
    "compile_network",
    "count",
    "create_model",
    "hardtanh_tanh_sign",
    "kernel_from_keras",
    "load_keras_weights",
    "quicknet",
    "quicknet_large",
    "quicknet_small",
    "reactnet18",
    "reactnet_a",
    "reactnet_small",
    "real_to_binary",
    "ste_sign",
    "wide_ste_sign",
    "xnornet",
]
