"""Part "repeat" of `bitfleet bench gpu`: whether a training step has the same bits twice, and what engine.deterministic does."""

import torch
from torch import Tensor

from bitfleet.launch.bench.gpu.networks import Setting, TrainingStep
from bitfleet.launch.bench.gpu.session import Session
from bitfleet.trainer.engine.config import Precision

NETWORKS = ("birealnet18", "xnornet")
PRECISIONS: tuple[Precision, ...] = ("bf16", "tf32")
NUM_REPEATS = 3
_NEEDED_SECONDS = 8.0


def different_gradients(setting: Setting, image_size: int, device: torch.device) -> list[str]:
    """Run forward and backward of the same network on the same images NUM_REPEATS times.

    Returns:
        Names of the parameters whose gradients did not have the same bits every time.
    """
    first, *again = (_gradients(setting, image_size, device) for _ in range(NUM_REPEATS))
    return [name for name, grad in first.items() if not all(torch.equal(grad, each[name]) for each in again)]


def _gradients(setting: Setting, image_size: int, device: torch.device) -> dict[str, Tensor]:
    step = TrainingStep(setting, image_size, device)
    step.close()  # else its hooks take the gradients away
    step.backward()
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


def measure_repeat(session: Session) -> None:
    """Write down how many gradients differ, with and without engine.deterministic."""
    for network in ("birealnet_small",) if session.tiny else NETWORKS:
        for precision in PRECISIONS:
            for deterministic in (True, False):
                batch_size = 2 if session.tiny else 128
                setting = Setting(network, batch_size, precision, deterministic=deterministic)
                session.attempt(network, _measure, session, setting, needs_seconds=_NEEDED_SECONDS)


def _measure(session: Session, setting: Setting) -> None:
    names = different_gradients(setting, 32 if session.tiny else 224, session.device)
    session.add(
        setting.network,
        batch_size=setting.batch_size,
        precision=setting.precision,
        deterministic=setting.deterministic,
        repeats=NUM_REPEATS,
        different_gradients=len(names),
        first_names=names[:3],
    )
