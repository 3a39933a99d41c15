"""Binary layers: the input is quantized, the weight itself is +-1.

There is no latent weight, no gradient estimator on the weight and no scale. The weight has the
attribute `binary = True`; optimizers recognize it by that mark alone. `start_real` makes the
weights of a network real until their first update.
"""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitfleet.models.layers.binary_conv import binary_conv2d, can_pack
from bitfleet.models.layers.quantizers import Quantizer
from bitfleet.models.layers.real_layers import (
    NO_PADDING,
    Initializer,
    check_window,
    conv2d,
    even_padding,
    glorot_uniform_,
    same_padding,
)


def random_signs_(weight: Tensor, initializer: Initializer) -> Tensor:
    """Fill with the signs (0 -> +1) of a sample of `initializer`.

    The official code starts from the real sample, which its first update turns into signs
    (`real_sample_`). That matters: the first gradients of a network of signs are up to hundreds of
    times smaller, and the moments remember them.
    """
    with torch.no_grad():
        initializer(weight)
        return weight.copy_(torch.where(weight >= 0, 1.0, -1.0))


def real_sample_(weight: Tensor, initializer: Initializer) -> Tensor:
    """Turn weights of +-1 into a sample of `initializer` with the same signs, in place.

    Glorot's distributions are symmetric, so magnitudes of a new sample with independent signs are a
    sample.
    """
    with torch.no_grad():
        return weight.mul_(initializer(torch.empty_like(weight)).abs_())


def _name(quantizer: Quantizer | None) -> str:
    return getattr(quantizer, "__name__", str(quantizer))


class _BinaryWeight(nn.Module):
    """Mark `weight` as binary, again whenever PyTorch replaces the Parameter object.

    If the mark were lost, Adam would train the weight as a real number without any error.
    """

    weight: Tensor
    initializer: Initializer

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Mark on construction and in `load_state_dict(assign=True)`."""
        super().register_parameter(name, param)
        self._mark_weight()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Mark after `copy.deepcopy` and unpickling."""
        module: Any = super()  # Any: torch leaves these two methods untyped
        module.__setstate__(state)
        self._mark_weight()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Mark after `to_empty` and other conversions that cannot keep the Parameter."""
        module: Any = super()
        module._apply(fn, recurse)
        self._mark_weight()
        return self

    def reset_parameters(self) -> None:
        """Draw new +-1 weights."""
        random_signs_(self.weight, self.initializer)

    def make_real(self) -> None:
        """Make the weights real, with the same signs, until the first update of an optimizer."""
        real_sample_(self.weight, self.initializer)

    def _mark_weight(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None:
            weight.binary = True  # type: ignore[attr-defined]


class QuantConv2d(_BinaryWeight, nn.Conv2d):
    """Convolution of the quantized, then padded input with a +-1 kernel, no bias.

    On a CPU with a C compiler it works on packed bits (binary_conv.py), otherwise it is torch's
    convolution.

    Args:
        in_channels: channels of the input [N, C, H, W].
        out_channels: channels of the output.
        kernel_size: side of the square kernel.
        stride: in both directions.
        padding: "same" as in TensorFlow, also if strided; "valid" (none); or pixels on each side.
        pad_value: of the padding, 0 or 1 (+1 is a sign, so that all products are of signs).
        input_quantizer: from quantizers.py; None for a first layer, which sees the real input.
        initializer: the signs (0 -> +1) of its sample are the initial weights.

    Raises:
        ValueError: an option is not one of these, or `forward` gets an input of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        input_quantizer: Quantizer | None,
        padding: Literal["same", "valid"] | int = "same",
        pad_value: Literal[0, 1] = 0,
        initializer: Initializer = glorot_uniform_,
    ) -> None:
        check_window(kernel_size, stride)
        if pad_value not in (0, 1):
            raise ValueError(f"pad_value is {pad_value}; expected 0 or 1")
        if padding not in ("same", "valid") and (not isinstance(padding, int) or padding < 0):
            raise ValueError(f'padding is {padding!r}; expected "same", "valid" or a number of pixels from 0 up')
        self.initializer = initializer
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)
        self.same = padding == "same"
        self.margin = NO_PADDING if isinstance(padding, str) else even_padding(padding)
        self.pad_value = pad_value
        self.input_quantizer = input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [N, in_channels, H, W]."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"QuantConv2d got an input {list(x.shape)}; expected [N, {self.in_channels}, H, W]")
        if self.weight.is_meta and not x.is_meta:
            raise ValueError(
                "QuantConv2d has no weights yet (they are on meta): move it with to_empty, then load or reset them"
            )
        stride = self.stride[0]
        padding = same_padding(x, self.kernel_size[0], stride) if self.same else self.margin
        if self.input_quantizer is None:
            return conv2d(x, self.weight, stride, padding, self.pad_value)
        if padding == NO_PADDING and x.shape[2:] == self.weight.shape[2:]:
            # The window is the whole input: a matrix product avoids changing the layout of a large
            # weight.
            product = F.linear(self.input_quantizer(x.flatten(1)), self.weight.flatten(1))
            return product[:, :, None, None]
        if can_pack(x, self.weight, self.input_quantizer):
            return binary_conv2d(x, self.weight, stride, padding, self.input_quantizer, self.pad_value)
        return conv2d(self.input_quantizer(x), self.weight, stride, padding, self.pad_value)

    def extra_repr(self) -> str:
        """Describe the options for `print(model)`."""
        conv: Any = super()
        padding = "same" if self.same else self.margin.top or "valid"
        value = f" of {self.pad_value:+d}" if self.pad_value else ""
        return f"{conv.extra_repr()}, padding={padding}{value}, input_quantizer={_name(self.input_quantizer)}"


class QuantLinear(_BinaryWeight, nn.Linear):
    """Product of the quantized input with a +-1 matrix, no bias.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        input_quantizer: from quantizers.py; None for a first layer, which sees the real input.
        initializer: the signs (0 -> +1) of its sample are the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        input_quantizer: Quantizer | None,
        initializer: Initializer = glorot_uniform_,
    ) -> None:
        self.initializer = initializer
        super().__init__(in_features, out_features, bias=False)
        self.input_quantizer = input_quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return F.linear(x if self.input_quantizer is None else self.input_quantizer(x), self.weight)

    def extra_repr(self) -> str:
        """Describe the options for `print(model)`."""
        return f"{super().extra_repr()}, input_quantizer={_name(self.input_quantizer)}"


def start_real(model: nn.Module) -> None:
    """Make the binary weights of `model` real, with the same signs, as the paper's code starts.

    Raises:
        ValueError: it has no binary layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BinaryWeight)]
    if not layers:
        raise ValueError("model.initial_weights is real, but this network has no binary weights: leave the option out")
    for layer in layers:
        layer.make_real()
