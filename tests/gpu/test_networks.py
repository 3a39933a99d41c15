"""The networks on the device: gradients close to the CPU's, exact sums of binary convolutions, the
same bits twice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.launch.bench.training import Setting, setting_step, use_precision
from bitfleet.models import ModelConfig, QuantConv2d, create_model
from bitfleet.models.layers.quantizers import ste_sign
from bitfleet.trainer.engine.config import Precision

pytestmark = pytest.mark.gpu
NETWORKS = {"birealnet_small": (32, 10), "binarynet": (32, 10), "birealnet18": (64, 100)}
"""Network whose gradients are compared -> pixels of an image, classes."""
NUM_REPEATS = 3


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_those_of_the_cpu(network: str, device: torch.device, is_dry: bool) -> None:
    if is_dry and network == "birealnet18":
        pytest.skip("too large for a dry run")
    found = compare_gradients(network, device, batch_size=2 if is_dry else 8)
    print(found)
    assert found["loss_device"] == pytest.approx(found["loss_cpu"], rel=1e-9)
    assert found["largest_error"] < 1e-6, found["parameter"]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_sums_of_bits_are_exact(precision: Precision, device: torch.device, is_dry: bool) -> None:
    found = compare_binary_sums(precision, 64 if is_dry else 512, device)
    print(found)
    assert found["num_different"] == 0
    assert found["largest_sum"] == 9 * (64 if is_dry else 512)


@pytest.mark.parametrize("network", ["birealnet18", "xnornet"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_deterministic_step_has_the_same_bits_twice(
    network: str, precision: Precision, device: torch.device, is_dry: bool
) -> None:
    if is_dry and network == "xnornet":
        pytest.skip("too large for a dry run")
    setting = Setting("birealnet_small" if is_dry else network, 2 if is_dry else 64, precision)
    assert different_gradients(setting, 32 if is_dry else 224, device) == []


def compare_gradients(network: str, device: torch.device, *, batch_size: int) -> dict[str, Any]:
    """Run one of NETWORKS in training mode on the device and on the CPU, in fp64.

    A sign flips with probability 1e-9 or so, and errors are rounding: 1e-10. In fp32 one activation
    that is rounded to the other side of 0 would change the sums of the next layer by 2.

    Returns:
        Both losses, and of the parameters' gradients the largest_error (norm of the difference over
        the norm) with its parameter, and the median_error.
    """
    size, num_classes = NETWORKS[network]
    torch.manual_seed(0)
    images = torch.randn(batch_size, size, size, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    labels = torch.randint(num_classes, (batch_size,))
    here, there = (create_model(ModelConfig(name=network, num_classes=num_classes)).double() for _ in "12")
    there.load_state_dict(here.state_dict())
    there.to(device)
    use_precision("fp32", device)
    loss_cpu, loss_device = _backward(here, images, labels), _backward(there, images.to(device), labels.to(device))
    pairs = zip(here.named_parameters(), there.parameters(), strict=True)
    errors = {name: _relative_error(other.grad, parameter.grad) for (name, parameter), other in pairs}
    ordered = sorted(errors, key=lambda name: errors[name])
    return {
        "loss_cpu": loss_cpu,
        "loss_device": loss_device,
        "largest_error": errors[ordered[-1]],
        "parameter": ordered[-1],
        "median_error": errors[ordered[len(ordered) // 2]],
    }


def _backward(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    loss = nn.functional.cross_entropy(model(images), labels)
    torch.autograd.backward(loss)
    return float(loss.detach())


def _relative_error(there: Tensor | None, here: Tensor | None) -> float:
    assert there is not None
    assert here is not None
    return float((there.cpu() - here).norm() / here.norm().clamp_min(torch.finfo(here.dtype).tiny))


def compare_binary_sums(precision: Precision, channels: int, device: torch.device) -> dict[str, float]:
    """Compare the sums of a binary 3x3 convolution on `device` with exact ones in fp64.

    Every sum has 9 * `channels` terms of +-1. fp32 and TF32 hold it exactly; bf16 holds integers up
    to 256, fp16 up to 2,048.
    """
    torch.manual_seed(0)
    layer = QuantConv2d(channels, channels, 3, padding="valid", input_quantizer=ste_sign)
    images = torch.randn(4, channels, 8, 8)
    # The filters agree with a window of the first image in a half to all of their terms: sums of
    # every size.
    agreement = torch.linspace(0.5, 1.0, channels)[:, None, None, None]
    with torch.no_grad():
        layer.weight.copy_(ste_sign(agreement - torch.rand_like(layer.weight)) * ste_sign(images[0, :, :3, :3]))
        exact = nn.functional.conv2d(ste_sign(images).double(), layer.weight.double())
        layer.to(device)
        with use_precision(precision, device):
            sums = layer(images.to(device)).double().cpu()
    difference = (sums - exact).abs()
    return {
        "num_sums": exact.numel(),
        "num_different": int((difference > 0).sum()),
        "largest_sum": float(exact.abs().max()),
        "largest_difference": float(difference.max()),
    }


def different_gradients(setting: Setting, image_size: int, device: torch.device) -> list[str]:
    """Run forward and backward of the same network on the same images NUM_REPEATS times.

    Returns:
        Names of the parameters whose gradients did not have the same bits every time.
    """
    first, *others = (_gradients(setting, image_size, device) for _ in range(NUM_REPEATS))
    return [name for name, grad in first.items() if not all(torch.equal(grad, other[name]) for other in others)]


def _gradients(setting: Setting, image_size: int, device: torch.device) -> dict[str, Tensor]:
    step = setting_step(setting, image_size, device, method="ddp")  # the sharded optimizer takes gradients away
    step.backward()
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
