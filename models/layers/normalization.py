"""The two normalizations of the official code, with Keras' constants and statistics, and none, for ablations."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BatchNorm", "ChannelAffine", "ChannelLayerNorm", "Norm", "normalization"]

Norm = Literal["batch", "layer", "none"]


def normalization(
    kind: Norm, num_channels: int, *, momentum: float, eps: float, scale: bool = True, gain: float | None = None
) -> nn.Module:
    """Normalization layer of a model variant.

    Args:
        kind: "batch", "layer" (the variants of the official code's master branch), or "none": what is left of a normalization
            without its statistics, a factor and an offset.
        num_channels: size of dimension 1 of the input.
        momentum: Keras' momentum of the running statistics, 1 minus PyTorch's; unused by "layer".
        eps: added to the variance; unused by "layer", which has Keras' default 1e-3 in every model.
        scale: whether to learn a factor beside the offset.
        gain: where the factor of "none" starts. None: the network has no such variant.

    Raises:
        ValueError: no such kind, or none that the network has.
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

    Keras runs images through a fused kernel, whose moving variance is the unbiased one, as PyTorch's; for [N, C] it
    averages the biased variance instead.

    Args:
        num_channels: C.
        momentum: Keras' momentum, 1 minus PyTorch's.
        eps: added to the variance.
        scale: whether to learn a factor beside the offset.
    """

    def __init__(self, num_channels: int, *, momentum: float, eps: float, scale: bool = True) -> None:
        # The difference is rounded to the decimal that was meant: 1 - 0.8 is 0.19999999999999996.
        super().__init__(num_channels, eps=eps, momentum=round(1 - momentum, 12))
        if not scale:
            self.weight = None  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Factor 1, offset 0, running mean 0 and variance 1."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize dimension 1."""
        result = super().forward(x)
        if self.training and x.dim() == 2:
            assert self.running_var is not None
            assert self.momentum is not None
            with torch.no_grad():
                num_rows, variance = x.shape[0], x.to(self.running_var.dtype).var(0, correction=0)
                # unbiased = biased * n / (n - 1), of which biased / (n - 1) is too much. Through .data: autograd has saved
                # running_var, does not read it in training, yet would refuse one that was changed since.
                self.running_var.data.sub_(variance, alpha=self.momentum / (num_rows - 1))
        return result

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"BatchNorm got {input.dim()} dimensions; expected [N, C] or [N, C, H, W]")


class ChannelLayerNorm(nn.LayerNorm):
    """Keras' LayerNormalization over the channels of each pixel: [N, C] or [N, C, H, W], eps 1e-3.

    Args:
        num_channels: C.
        scale: whether to learn a factor beside the offset.
    """

    def __init__(self, num_channels: int, *, scale: bool = True) -> None:
        super().__init__(num_channels, eps=1e-3)
        if not scale:
            self.weight = None  # type: ignore[assignment]

    def reset_parameters(self) -> None:
        """Factor 1, offset 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize dimension 1."""
        # Both moves are views; on a channels_last input they also make the data contiguous for the kernel.
        result = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return result.movedim(-1, 1)


class ChannelAffine(nn.Module):
    """A learned factor and offset of each channel, without statistics: [N, C] or [N, C, H, W].

    Args:
        num_channels: C.
        gain: where the factors start; the offsets start at 0.
    """

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
        """Options in `print(model)`."""
        return f"{self.weight.numel()}, gain={self.gain:.3g}"
