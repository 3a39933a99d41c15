"""Parts "gradients", "update", "networks" and "repeat" of `bitfleet bench gpu`."""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.networks import measure_settings
from bitfleet.launch.bench.step import SIZES, measure_step
from bitfleet.launch.bench.training import PRECISIONS, REFERENCE, Setting, TrainingStep, use_precision
from bitfleet.models import ModelConfig, QuantConv2d, create_model
from bitfleet.models.layers.quantizers import ste_sign
from bitfleet.optim.kernels.kernels import on_gpu
from bitfleet.trainer.engine.config import Precision

NETWORKS = {"birealnet_small": (32, 10), "binarynet": (32, 10), "birealnet18": (64, 100)}
"""Network whose gradients are compared -> pixels of an image, classes."""
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
SETTINGS = [
    Setting(network, *rest)
    for rest in (
        (256, "bf16", False, True),
        (256, "bf16", True, False),  # both sides as fast as they can be: the targets are ratios of these
        (256, "tf32", False, True),
        (256, "bf16", False, False),
        (256, "bf16", True, True),
        (128, "bf16", False, True),
        (256, "fp32", False, True),
        (256, "tf32", True, True),
        (128, "bf16", True, True),
    )
    for network in ("birealnet18", "xnornet", REFERENCE)
]
"""Most valuable first."""
TINY = [Setting("birealnet_small", 2, "bf16", is_compiled=True), Setting(REFERENCE, 2, "fp32")]
NUM_REPEATS = 3


def compare_gradients(network: str, dtype: str, device: torch.device, *, batch_size: int) -> dict[str, Any]:
    """Run one of NETWORKS in training mode on the device and on the CPU, without TF32.

    In fp64 a sign flips with probability 1e-9 or so, and errors are rounding: 1e-10. In fp32 one
    activation that is rounded to the other side of 0 changes the sums of the next layer by 2, and
    the errors of single parameters may be large.

    Returns:
        Both losses, and of the parameters' gradients the largest_error (norm of the difference over
        the norm) with its parameter, and the median_error.
    """
    size, num_classes = NETWORKS[network]
    torch.manual_seed(0)
    images = torch.randn(batch_size, size, size, 3, dtype=DTYPES[dtype]).permute(0, 3, 1, 2)
    labels = torch.randint(num_classes, (batch_size,))
    here, there = (create_model(ModelConfig(name=network, num_classes=num_classes)).to(DTYPES[dtype]) for _ in "12")
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


def measure_gradients(session: Session) -> None:
    """Write down every comparison of gradients and sums."""
    batch_size, channels = (2, 64) if session.tiny else (8, 512)

    def gradients(network: str, dtype: str) -> None:
        result = compare_gradients(network, dtype, session.device, batch_size=batch_size)
        session.add(f"gradients of {network}", dtype=dtype, **result)

    def sums(precision: Precision) -> None:
        result = compare_binary_sums(precision, channels, session.device)
        session.add("binary sums", precision=precision, terms=9 * channels, **result)

    for network in ("birealnet_small", "binarynet") if session.tiny else NETWORKS:
        for dtype in DTYPES:
            session.attempt(f"gradients of {network}", gradients, network, dtype)
    for precision in PRECISIONS:
        session.attempt("binary sums", sums, precision)


def measure_update(session: Session) -> None:
    """Write down the contenders of `bitfleet bench step` on the device, the larger size first."""

    def measure(numel: int, num_rounds: int, weights_per_turn: int) -> None:
        for row in measure_step(numel, num_rounds, session.device, weights_per_turn=weights_per_turn):
            figures = row._asdict()
            session.add(figures.pop("name"), **figures, GB_per_second=row.bytes_per_weight / row.ns_per_weight)
        if session.is_cuda:
            runs_in = "Triton" if on_gpu(lambda triton: None) else "eager torch, the fallback"
            session.add("kernel on bits", runs_in=runs_in)

    for numel in (6400,) if session.tiny else sorted(SIZES, reverse=True):
        rounds_and_work = (1, 0) if session.tiny else (11, 50_000_000)
        session.attempt(f"{numel:,} weights", measure, numel, *rounds_and_work, needs_seconds=15.0)  # compiles


def measure_networks(session: Session) -> None:
    """Write down every setting for which there is time, in order of worth."""
    for setting in TINY if session.tiny else SETTINGS:
        needed = 0.0 if session.tiny else 60.0 if setting.is_compiled else 15.0
        session.attempt(setting.network, _measure_network, session, setting, needs_seconds=needed)


def _measure_network(session: Session, setting: Setting) -> None:
    size, num_rounds, warm_up = (32, 1, 1) if session.tiny else (224, 8, 3)
    if setting.is_compiled:  # the limit of recompilations counts over all networks of a process
        torch.compiler.reset()
    counts = {"num_rounds": num_rounds, "num_steps": 1, "warm_up": warm_up}
    (speed,) = measure_settings([setting], size, session.device, **counts)
    milliseconds = [1e3 * setting.batch_size / rate for rate in speed.rates]
    figures = setting._asdict()
    session.add(
        figures.pop("network"),
        **figures,
        images_per_second=statistics.median(speed.rates),
        ms=statistics.median(milliseconds),
        ms_least=min(milliseconds),
        ms_most=max(milliseconds),
        peak_MB=speed.peak_MB,
        first_step_seconds=speed.first_seconds,
        loss=speed.loss,
    )


def different_gradients(setting: Setting, image_size: int, device: torch.device) -> list[str]:
    """Run forward and backward of the same network on the same images NUM_REPEATS times.

    Returns:
        Names of the parameters whose gradients did not have the same bits every time.
    """
    first, *again = (_gradients(setting, image_size, device) for _ in range(NUM_REPEATS))
    return [name for name, grad in first.items() if not all(torch.equal(grad, other[name]) for other in again)]


def _gradients(setting: Setting, image_size: int, device: torch.device) -> dict[str, Tensor]:
    step = TrainingStep(setting, image_size, device)
    step.close()  # else its hooks take the gradients away
    step.backward()
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


def measure_repeat(session: Session) -> None:
    """Write down how many gradients differ, with and without engine.deterministic."""

    def measure(setting: Setting) -> None:
        names = different_gradients(setting, 32 if session.tiny else 224, session.device)
        figures = setting._asdict() | {
            "repeats": NUM_REPEATS,
            "different_gradients": len(names),
            "first_names": names[:3],
        }
        session.add(figures.pop("network"), **figures)

    networks, batch_size = (["birealnet_small"], 2) if session.tiny else (["birealnet18", "xnornet"], 128)
    precisions: tuple[Precision, ...] = ("bf16", "tf32")
    for network in networks:
        for precision in precisions:
            for deterministic in (True, False):
                setting = Setting(network, batch_size, precision, deterministic=deterministic)
                session.attempt(network, measure, setting, needs_seconds=8.0)
