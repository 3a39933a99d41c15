"""TensorFlow's SAME padding for convolutions and pools, also strided ones, where PyTorch has no name for it.

The output has ceil(size / stride) rows. Of an odd number of rows to pad, the surplus one goes to the bottom (and right),
so a stride-2 3x3 layer on an even size pads nothing on top: symmetric padding would sample a grid shifted by one pixel.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from bitfleet.models.layers.initializers import Initializer, glorot_uniform_

__all__ = ["NO_PADDING", "Padding", "SameAvgPool2d", "SameConv2d", "SameMaxPool2d", "conv2d", "same_padding"]


class Padding(NamedTuple):
    """Rows and columns added on each side, in the order of `torch.nn.functional.pad`."""

    left: int
    right: int
    top: int
    bottom: int

    @property
    def is_symmetric(self) -> bool:
        """Whether a convolution can pad by itself."""
        return self.left == self.right and self.top == self.bottom


NO_PADDING = Padding(0, 0, 0, 0)


def same_padding(x: Tensor, kernel_size: int, stride: int) -> Padding:
    """Padding that TensorFlow calls SAME, for a square window on `x` [N, C, H, W]."""
    vertical, horizontal = (
        max((-(-size // stride) - 1) * stride + kernel_size - size, 0) for size in (x.shape[2], x.shape[3])
    )
    return Padding(horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: Padding) -> Tensor:
    """Convolution without bias on `x` [N, C, H, W], zeros padded.

    Args:
        x: [N, C, H, W].
        weight: [out, C, kernel height, kernel width].
        stride: step in both directions.
        padding: an asymmetric one costs a copy of `x`.
    """
    if padding.is_symmetric:
        return F.conv2d(x, weight, None, stride, (padding.top, padding.left))
    return F.conv2d(F.pad(x, padding), weight, None, stride)


class SameConv2d(nn.Conv2d):
    """Real-valued convolution with TensorFlow's SAME padding, Keras' initialization and no bias.

    Args:
        in_channels: channels of the input [N, C, H, W].
        out_channels: channels of the output.
        kernel_size: side of the square kernel.
        stride: step in both directions.
        initializer: fills the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        initializer: Initializer = glorot_uniform_,
    ) -> None:
        self.initializer = initializer
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.initializer(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        stride = self.stride[0]
        return conv2d(x, self.weight, stride, same_padding(x, self.kernel_size[0], stride))


class _SamePool2d(nn.Module):
    """A pool whose windows ignore what is outside the image.

    PyTorch's `ceil_mode` adds the window that hangs over the bottom or right edge; together with half of the padding,
    rounded down, on both sides it is SAME, without a padded copy of the input.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        if not 2 <= stride <= kernel_size:
            raise ValueError(f"stride is {stride}; ceil_mode equals SAME for 2 <= stride <= kernel_size={kernel_size}")
        self.kernel_size = kernel_size
        self.stride = stride

    def extra_repr(self) -> str:
        """Options in `print(model)`."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class SameMaxPool2d(_SamePool2d):
    """Maximum of the pixels inside the image, TensorFlow's SAME padding (of -inf). [N, C, H, W] -> ceil(H / stride)."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool [N, C, H, W]."""
        padding = same_padding(x, self.kernel_size, self.stride)
        return F.max_pool2d(x, self.kernel_size, self.stride, (padding.top, padding.left), ceil_mode=True)


class SameAvgPool2d(_SamePool2d):
    """Mean of the pixels inside the image: padding counts neither in the sum nor in the divisor, as in TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        """Pool [N, C, H, W]."""
        padding = (same := same_padding(x, self.kernel_size, self.stride)).top, same.left
        return F.avg_pool2d(x, self.kernel_size, self.stride, padding, ceil_mode=True, count_include_pad=False)
