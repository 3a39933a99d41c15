"""Part "gradients" of `bitfleet bench gpu`: the networks on the device against the CPU, and which precisions sum bits exactly."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.precision import PRECISIONS, use_precision
from bitfleet.models import ModelConfig, QuantConv2d, create_model
from bitfleet.models.layers.quantizers import ste_sign
from bitfleet.trainer.engine.config import Precision

NETWORKS = {"birealnet_small": (32, 10), "binarynet": (32, 10), "birealnet18": (64, 100)}
"""Network -> pixels of an image, classes."""
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
CPU = torch.device("cpu")


class GradientComparison(NamedTuple):
    """One forward and backward pass of a network on the device against the CPU."""

    loss_cpu: float
    loss_device: float
    largest_error: float
    """Of a parameter's gradient: norm of the difference over the norm."""
    parameter: str
    """The one with that error."""
    median_error: float


def compare_gradients(network: str, dtype: str, device: torch.device, *, batch_size: int) -> GradientComparison:
    """Run `network` in training mode on the same images, weights and labels, channels last, without TF32.

    In fp64 a sign flips with probability 1e-9 or so, and errors are rounding: 1e-10. In fp32 one activation that is rounded to
    the other side of 0 changes the sums of the next layer by 2, and the errors of single parameters may be large.

    Args:
        network: one of NETWORKS.
        dtype: "fp64" or "fp32".
        device: what is compared with the CPU.
        batch_size: images.
    """
    size, num_classes = NETWORKS[network]
    torch.manual_seed(0)
    images = torch.randn(batch_size, size, size, 3, dtype=DTYPES[dtype]).permute(0, 3, 1, 2)
    labels = torch.randint(num_classes, (batch_size,))
    here: nn.Module = create_model(ModelConfig(name=network, num_classes=num_classes)).to(DTYPES[dtype])
    there: nn.Module = create_model(ModelConfig(name=network, num_classes=num_classes)).to(DTYPES[dtype])
    there.load_state_dict(here.state_dict())
    there.to(device)
    use_precision("fp32", device)
    losses = [_backward(here, images, labels), _backward(there, images.to(device), labels.to(device))]
    errors = {
        name: _relative_error(there_parameter.grad, parameter.grad)
        for (name, parameter), there_parameter in zip(here.named_parameters(), there.parameters(), strict=True)
    }
    worst = max(errors, key=lambda name: errors[name])
    median = sorted(errors.values())[len(errors) // 2]
    return GradientComparison(losses[0], losses[1], errors[worst], worst, median)


def _backward(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    loss = nn.functional.cross_entropy(model(images), labels)
    torch.autograd.backward(loss)
    return float(loss.detach())


def _relative_error(there: Tensor | None, here: Tensor | None) -> float:
    assert there is not None
    assert here is not None
    return float((there.cpu() - here).norm() / here.norm().clamp_min(torch.finfo(here.dtype).tiny))


class SumComparison(NamedTuple):
    """The sums of a binary convolution against the integers that they stand for."""

    num_sums: int
    num_different: int
    largest_sum: float
    largest_difference: float


def compare_binary_sums(precision: Precision, channels: int, device: torch.device) -> SumComparison:
    """Run a binary 3x3 convolution of `channels` channels on `device` in one of PRECISIONS, against exact sums in fp64.

    Every sum has 9 * `channels` terms of +-1. fp32 and TF32 hold it exactly; bf16 holds integers up to 256, fp16 up to 2,048.
    """
    torch.manual_seed(0)
    layer = QuantConv2d(channels, channels, 3, padding="valid", input_quantizer=ste_sign)
    images = torch.randn(4, channels, 8, 8)
    # The filters agree with a window of the first image in a half to all of their terms: sums of every size.
    agreement = torch.linspace(0.5, 1.0, channels)[:, None, None, None]
    with torch.no_grad():
        layer.weight.copy_(ste_sign(agreement - torch.rand_like(layer.weight)) * ste_sign(images[0, :, :3, :3]))
        exact = nn.functional.conv2d(ste_sign(images).double(), layer.weight.double())
        layer.to(device)
        with use_precision(precision, device):
            sums = layer(images.to(device)).double().cpu()
    difference = (sums - exact).abs()
    return SumComparison(exact.numel(), int((difference > 0).sum()), float(exact.abs().max()), float(difference.max()))


def measure_gradients(session: Session) -> None:
    """Write down every comparison."""
    for network in ("birealnet_small", "binarynet") if session.tiny else NETWORKS:
        for dtype in DTYPES:
            session.attempt(f"gradients of {network}", _measure_network, session, network, dtype)
    for name in PRECISIONS:
        session.attempt("binary sums", _measure_sums, session, name)


def _measure_network(session: Session, network: str, dtype: str) -> None:
    result = compare_gradients(network, dtype, session.device, batch_size=2 if session.tiny else 8)
    session.add(f"gradients of {network}", dtype=dtype, **result._asdict())


def _measure_sums(session: Session, name: Precision) -> None:
    channels = 64 if session.tiny else 512
    result = compare_binary_sums(name, channels, session.device)
    session.add("binary sums", precision=name, terms=9 * channels, **result._asdict())
