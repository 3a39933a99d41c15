"""Full-precision layers as in Keras: initializers, SAME padding of convolutions and pools, norms.

TensorFlow's SAME padding gives ceil(size / stride) rows. Of an odd number of rows to pad, the
surplus one goes to the bottom (and right), so a stride-2 3x3 layer on an even size pads nothing on
top: PyTorch's symmetric padding would sample a grid shifted by one pixel.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Initializer = Callable[[Tensor], Tensor]
Norm = Literal["batch", "layer", "none"]

_TRUNCATED_STDDEV = 0.87962566103423978
"""Standard deviation of a unit normal truncated at +-2. Keras divides by it, so that the truncated
sample has the wanted variance."""


def glorot_uniform_(weight: Tensor) -> Tensor:
    """Fill with U(-a, a), a = sqrt(6 / (fan_in + fan_out)), Keras' default.

    Args:
        weight: floating point, [out, in] or [out, in, height, width].
    """
    return nn.init.xavier_uniform_(weight)


def glorot_normal_(weight: Tensor) -> Tensor:
    """Fill with Keras' truncated normal: 2 standard deviations, variance 2 / (fan_in + fan_out).

    Args:
        weight: floating point, [out, in] or [out, in, height, width].
    """
    receptive_field = weight[0][0].numel()
    fan_in, fan_out = weight.shape[1] * receptive_field, weight.shape[0] * receptive_field
    std = (2.0 / (fan_in + fan_out)) ** 0.5 / _TRUNCATED_STDDEV
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def he_normal_(weight: Tensor) -> Tensor:
    """Fill with Keras' truncated normal: 2 standard deviations, variance 2 / fan_in.

    Args:
        weight: floating point, [out, in] or [out, in, height, width].
    """
    std = (2.0 / weight[0].numel()) ** 0.5 / _TRUNCATED_STDDEV
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Padding(NamedTuple):
    """Rows and columns added on each side, in the order of `torch.nn.functional.pad`."""

    left: int
    right: int
    top: int
    bottom: int

    @property
    def is_symmetric(self) -> bool:
        """Return True if torch's convolutions can apply it themselves."""
        return self.left == self.right and self.top == self.bottom


NO_PADDING = Padding(0, 0, 0, 0)


def even_padding(margin: int) -> Padding:
    """Return the padding of `margin` pixels on each side."""
    return Padding(margin, margin, margin, margin)


def check_window(kernel_size: int, stride: int) -> None:
    """Raise ValueError unless both are whole numbers from 1 up."""
    for name, value in (("kernel_size", kernel_size), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number from 1 up: windows are square")


def same_padding(x: Tensor, kernel_size: int, stride: int) -> Padding:
    """Compute TensorFlow's SAME padding for a square window on `x` [N, C, H, W]."""
    vertical, horizontal = (
        max((-(-size // stride) - 1) * stride + kernel_size - size, 0) for size in (x.shape[2], x.shape[3])
    )
    return Padding(horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: Padding, pad_value: float = 0.0, groups: int = 1) -> Tensor:
    """Convolve `x` [N, C, H, W], padded, without bias.

    Padding that is asymmetric, or not with zeros, copies `x`.
    """
    if padding.is_symmetric and (pad_value == 0 or padding == NO_PADDING):
        return F.conv2d(x, weight, None, stride, (padding.top, padding.left), groups=groups)
    return F.conv2d(F.pad(x, padding, value=pad_value), weight, None, stride, groups=groups)


class SameConv2d(nn.Conv2d):
    """Real-valued convolution with TensorFlow's SAME padding, Keras' initialization and no bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        initializer: Initializer = glorot_uniform_,
        groups: int = 1,
    ) -> None:
        check_window(kernel_size, stride)
        self.initializer = initializer
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.initializer(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        stride = self.stride[0]
        return conv2d(x, self.weight, stride, same_padding(x, self.kernel_size[0], stride), groups=self.groups)


class SameDepthwiseConv2d(SameConv2d):
    """The same with one filter per channel, which sees only its channel."""

    def __init__(self, num_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(num_channels, num_channels, kernel_size, stride, groups=num_channels)


class _SamePool2d(nn.Module):
    """A pool whose windows ignore pixels outside the image.

    PyTorch's `ceil_mode` adds the window that crosses the bottom or right edge; together with half
    of the padding, rounded down, on both sides it equals SAME without a padded copy of the input.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        if not 2 <= stride <= kernel_size:
            raise ValueError(f"stride is {stride}; ceil_mode equals SAME for 2 <= stride <= kernel_size={kernel_size}")
        self.kernel_size = kernel_size
        self.stride = stride

    def extra_repr(self) -> str:
        """Describe the options for `print(model)`."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class SameMaxPool2d(_SamePool2d):
    """Maximum over the pixels inside the image, with SAME padding (of -inf)."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        padding = same_padding(x, self.kernel_size, self.stride)
        return F.max_pool2d(x, self.kernel_size, self.stride, (padding.top, padding.left), ceil_mode=True)


class SameAvgPool2d(_SamePool2d):
    """Mean over the pixels inside the image, with SAME padding that is not counted."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        padding = (same := same_padding(x, self.kernel_size, self.stride)).top, same.left
        return F.avg_pool2d(x, self.kernel_size, self.stride, padding, ceil_mode=True, count_include_pad=False)


class BlurPool2d(nn.Module):
    """Every second pixel of an image blurred by the outer square of [1, 2, 1] / 4, zero-padded.

    It removes what the smaller image cannot show (Zhang, "Making Convolutional Networks
    Shift-Invariant Again", arXiv 1904.11486). Two means over 2x2 pixels are that filter, with SAME
    padding of 3x3 windows.
    """

    macs_per_output = 9
    """As larq counts it: a depthwise 3x3 convolution whose kernel is fixed."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]."""
        return F.avg_pool2d(F.avg_pool2d(F.pad(x, same_padding(x, 3, 2)), 2, 1), 2)


class ChannelBias(nn.Module):
    """Learned offset (initially 0) per channel of [N, C, H, W].

    Before a sign it is the threshold that ReActNet calls RSign.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shift dimension 1."""
        return x + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Describe the options for `print(model)`."""
        return f"{self.bias.numel()}"


class RPReLU(nn.Sequential):
    """ReActNet's activation: x -> PReLU(x + shift) + offset, all learned per channel.

    Shift and offset start at 0, the slope of negative values at 0.25.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(ChannelBias(num_channels), nn.PReLU(num_channels), ChannelBias(num_channels))


def normalization(
    kind: Norm, num_channels: int, *, momentum: float, eps: float, scale: bool = True, gain: float | None = None
) -> nn.Module:
    """Create the normalization layer of a network.

    Args:
        kind: "batch", "layer" (as in the official code's master branch), or "none": only a factor
            and an offset, without statistics.
        num_channels: size of dimension 1 of the input.
        momentum: Keras' momentum of the running statistics, 1 minus PyTorch's; for "batch".
        eps: added to the variance, for "batch"; "layer" uses Keras' default 1e-3 in every network.
        scale: learn a factor besides the offset.
        gain: initial factor of "none". None: the network has no such variant.

    Raises:
        ValueError: the kind does not exist, or the network does not have it.
    """
    if kind == "batch":
        return BatchNorm(num_channels, momentum=momentum, eps=eps, scale=scale)
    if kind == "layer":
        return ChannelLayerNorm(num_channels, scale=scale)
    if kind == "none" and gain is not None:
        return ChannelAffine(num_channels, gain)
    expected = '"batch" or "layer"' if gain is None else '"batch", "layer" or "none"'
    raise ValueError(f"norm is {kind!r}; expected {expected}")


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalization of [N, C] or [N, C, H, W] as Keras computes it.

    For images Keras averages the unbiased variance, like PyTorch; for [N, C] it averages the biased
    variance.

    Args:
        num_channels: C.
        momentum: Keras' momentum, 1 minus PyTorch's.
        eps: added to the variance.
        scale: learn a factor.
        center: learn an offset.
    """

    def __init__(
        self, num_channels: int, *, momentum: float, eps: float, scale: bool = True, center: bool = True
    ) -> None:
        # Rounded to the decimal that was meant: 1 - 0.8 is 0.19999999999999996.
        super().__init__(num_channels, eps=eps, momentum=round(1 - momentum, 12))
        if not scale:
            self.weight = None  # type: ignore[assignment]
        if not center:
            self.bias = None  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Reset to factor 1, offset 0, running mean 0 and variance 1."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize dimension 1."""
        result = super().forward(x)
        if self.training and x.dim() == 2:
            assert self.running_var is not None
            assert self.momentum is not None
            with torch.no_grad():
                num_rows, variance = x.shape[0], x.to(self.running_var.dtype).var(0, correction=0)
                # unbiased = biased * n / (n - 1): biased / (n - 1) is too much. Through .data:
                # autograd has saved running_var, which it does not read in training, but it would
                # complain about the change.
                self.running_var.data.sub_(variance, alpha=self.momentum / (num_rows - 1))
        return result

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"BatchNorm got {input.dim()} dimensions; expected [N, C] or [N, C, H, W]")


class ChannelLayerNorm(nn.LayerNorm):
    """Keras' LayerNormalization over channels: [N, C] or [N, C, H, W], eps 1e-3."""

    def __init__(self, num_channels: int, *, scale: bool = True) -> None:
        super().__init__(num_channels, eps=1e-3)
        if not scale:
            self.weight = None  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Reset to factor 1, offset 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize dimension 1."""
        # Both moves are views; on a channels_last input they also make the data contiguous for the
        # kernel.
        result = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return result.movedim(-1, 1)


class ChannelAffine(nn.Module):
    """Learned factor (initially `gain`) and offset (0) per channel: [N, C] or [N, C, H, W]."""

    def __init__(self, num_channels: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.full((num_channels,), gain))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift dimension 1."""
        shape = (-1,) + (1,) * (x.dim() - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        """Describe the options for `print(model)`."""
        return f"{self.weight.numel()}, gain={self.gain:.3g}"
