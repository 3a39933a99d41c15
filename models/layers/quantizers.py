"""Binary activation quantizers: the sign forward, a pseudo-gradient backward.

`ste_sign`, `wide_ste_sign` and `approx_sign` agree with larq bit for bit (sign(0) = sign(-0.0) =
+1). Backward keeps the input: the gradient of `approx_sign` depends on every bit of |x|, and
torch.compile recomputes what it can. (Binary convolutions on a CPU keep less, see binary_conv.py.)
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Quantizer = Callable[[Tensor], Tensor]
Binarizer = Literal["ste", "wide_ste", "approx", "hardtanh_tanh"]
LIMITS: dict[Binarizer, float] = {"ste": 1.0, "wide_ste": 1.25}
"""The largest |x| that has a gradient, for quantizers whose pseudo-gradient is a mask."""


def quantizer_of(binarizer: Binarizer) -> Quantizer:
    """Return the quantizer of the network option `binarizer`.

    Raises:
        ValueError: there is no such quantizer.
    """
    known = _quantizers()
    if binarizer not in known:
        raise ValueError(f'binarizer is {binarizer!r}; expected "ste", "wide_ste", "approx" or "hardtanh_tanh"')
    return known[binarizer]


def binarizer_of(quantizer: Quantizer) -> Binarizer | None:
    """Return the name of a quantizer of this file; None for any other function."""
    return next((name for name, known in _quantizers().items() if known is quantizer), None)


def _quantizers() -> dict[Binarizer, Quantizer]:
    return {"ste": ste_sign, "wide_ste": wide_ste_sign, "approx": approx_sign, "hardtanh_tanh": hardtanh_tanh_sign}


def ste_sign(x: Tensor) -> Tensor:
    r"""Sign with the clipped straight-through gradient.

    Forward: $q(x) = +1$ if $x \ge 0$, else $-1$. Backward: $\partial q / \partial x = 1$ if $|x|
    \le 1$, else $0$.

    Source: Courbariaux et al., "Binarized Neural Networks", arXiv 1602.02830;
    `larq.quantizers.SteSign`.

    Args:
        x: floating point, any shape.

    Returns:
        +-1, shape, dtype and memory format of `x`.
    """
    return _signs(x, "ste")


def wide_ste_sign(x: Tensor) -> Tensor:
    r"""Sign with the straight-through gradient, clipped at 1.25.

    Forward: $q(x) = +1$ if $x \ge 0$, else $-1$. Backward: $\partial q / \partial x = 1$ if $|x|
    \le 1.25$, else $0$.

    Source: Bethge et al., "Back to Simplicity", arXiv 1906.08637;
    `larq.quantizers.SteSign(clip_value=1.25)`.

    Args:
        x: floating point, any shape.

    Returns:
        +-1, shape, dtype and memory format of `x`.
    """
    return _signs(x, "wide_ste")


def approx_sign(x: Tensor) -> Tensor:
    r"""Sign with the gradient of a piecewise quadratic approximation.

    Forward: $q(x) = +1$ if $x \ge 0$, else $-1$. Backward: $\partial q / \partial x = 2 - 2|x|$ if
    $|x| \le 1$, else $0$.

    Source: Liu et al., "Bi-Real Net", arXiv 1808.00278; `larq.quantizers.ApproxSign`.

    Args:
        x: floating point, any shape.

    Returns:
        +-1, shape, dtype and memory format of `x`.
    """
    return _signs(x, "approx")


def hardtanh_tanh_sign(x: Tensor) -> Tensor:
    r"""Sign with the gradient of tanh inside the region where Hardtanh is not clipped.

    Forward: $q(x) = +1$ if $x \ge 0$, else $-1$. Backward: $\partial q / \partial x = 1 -
    \tanh^2(x)$ if $|x| \le 1$, else $0$.

    Source: the feature binarizer that De Putter and Corporaal, "How to train accurate BNNs for
    embedded systems?", arXiv 2206.12322, call Hardtanh-tanh. Their formula was not available: this
    one follows the name and may differ.

    Args:
        x: floating point, any shape.

    Returns:
        +-1, shape, dtype and memory format of `x`.
    """
    return _signs(x, "hardtanh_tanh")


def pseudo_gradient(binarizer: Binarizer, x: Tensor, grad: Tensor) -> Tensor:
    """Compute the gradient of a quantizer's input `x` from `grad`, that of its output.

    Masks are arithmetic: boolean ones make the compiled model 15 to 20 % slower.
    """
    if binarizer in LIMITS:
        return (x.abs() <= LIMITS[binarizer]).to(grad.dtype) * grad
    if binarizer == "approx":
        # 2 - 2|x| is negative exactly if |x| > 1, so a clamp is the mask. In place, to stay in the
        # cache.
        return x.abs().mul_(-2).add_(2).clamp_min_(0).mul_(grad)
    inside = (x.abs() <= 1).to(grad.dtype)
    return x.tanh().square_().neg_().add_(1).mul_(inside).mul_(grad)


def _signs(x: Tensor, binarizer: Binarizer) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _sign(x)
    result: Tensor = _Sign.apply(x, binarizer)
    return result


def _sign(x: Tensor) -> Tensor:
    # sign(sign(x) + 0.1) is larq's definition, and in place six times as fast on a CPU as
    # torch.where with scalars. Not in place for torch.compile, which fuses the passes: torch 2.11
    # would lose the pseudo-gradient of an in-place forward.
    if torch.compiler.is_compiling():
        return x.sgn().add(0.1).sgn()
    return x.sgn().add_(0.1).sgn_()


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, binarizer: Binarizer) -> Tensor:
        ctx.save_for_backward(x)
        ctx.binarizer = binarizer
        return _sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x: Tensor
        (x,) = ctx.saved_tensors
        return pseudo_gradient(ctx.binarizer, x, grad), None
