"""Glorot initializers with Keras' distributions, and the +-1 weights drawn from their signs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Initializer", "glorot_normal_", "glorot_uniform_", "random_signs_", "real_sample_"]

Initializer = Callable[[Tensor], Tensor]

# Standard deviation of a unit normal truncated at +-2: Keras divides by it so that the truncated sample has the variance
# asked for.
_TRUNCATED_STDDEV = 0.87962566103423978


def glorot_uniform_(weight: Tensor) -> Tensor:
    """Fill with U(-a, a), a = sqrt(6 / (fan_in + fan_out)), Keras' default.

    Args:
        weight: floating point, [out, in] or [out, in, height, width].
    """
    return nn.init.xavier_uniform_(weight)


def glorot_normal_(weight: Tensor) -> Tensor:
    """Fill with a normal truncated at two standard deviations, variance 2 / (fan_in + fan_out), as Keras does.

    Args:
        weight: floating point, [out, in] or [out, in, height, width].
    """
    receptive_field = weight[0][0].numel()
    fan_in, fan_out = weight.shape[1] * receptive_field, weight.shape[0] * receptive_field
    std = (2.0 / (fan_in + fan_out)) ** 0.5 / _TRUNCATED_STDDEV
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def random_signs_(weight: Tensor, initializer: Initializer) -> Tensor:
    """Fill with the signs (0 -> +1) of a sample of `initializer`.

    The official code starts from the real sample, which its first update turns into signs. `real_sample_` gives that: the first
    gradients of a network of signs are up to hundreds of times smaller, and the moments keep what they saw.

    Args:
        weight: floating point, [out, in] or [out, in, height, width].
        initializer: fills its argument in place.
    """
    with torch.no_grad():
        initializer(weight)
        return weight.copy_(torch.where(weight >= 0, 1.0, -1.0))


def real_sample_(weight: Tensor, initializer: Initializer) -> Tensor:
    """Turn weights of +-1 into a sample of `initializer` with the same signs, in place.

    Glorot's distributions are symmetric: the magnitudes of a new sample, with signs drawn apart from them, are such a sample.

    Args:
        weight: floating point, [out, in] or [out, in, height, width].
        initializer: fills its argument in place.
    """
    with torch.no_grad():
        return weight.mul_(initializer(torch.empty_like(weight)).abs_())
