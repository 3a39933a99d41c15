from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitfleet.optim import OptimConfig, build_optimizer
from bitfleet.trainer.engine.batchnorm_statistics import RunningStatistics
from bitfleet.trainer.metrics import StepObserver
from bitfleet.trainer.ranks.collectives import Ranks
from bitfleet.trainer.train_step import TrainStep

IMAGES = torch.arange(48.0).view(4, 2, 2, 3)
LABELS = torch.tensor([0, 1, 2, 3])
SHARES = torch.eye(5)[LABELS] * 0.7 + torch.eye(5)[LABELS.flip(0)] * 0.3
SMOOTHED = torch.eye(5)[LABELS] * 0.9 + 0.1 / 5


class Engine:
    """Stand in for the part of DeepSpeed's engine that TrainStep uses."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.losses: list[Tensor] = []

    def __call__(self, images: Tensor) -> Any:
        return self.model(images)

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        loss.backward()

    def step(self) -> None:
        """Update nothing."""


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("labels", "smoothing", "targets"),
    [
        (LABELS, 0.0, torch.eye(5)[LABELS]),
        (LABELS, 0.1, SMOOTHED),
        (SHARES, 0.0, SHARES),
        (SHARES, 0.1, SMOOTHED * 0.7 + SMOOTHED.flip(0) * 0.3),
    ],
)
def test_loss_of_smoothed_and_mixed_labels(labels: Tensor, smoothing: float, targets: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    optimizer, _ = build_optimizer(model, OptimConfig(), num_steps=1)
    engine, device = Engine(model), torch.device("cpu")
    observer = StepObserver(Ranks(0, 1, 0, 1), device, flips=None, counts_replaced=False)  # type: ignore[arg-type]
    step = TrainStep(
        engine,
        model,
        optimizer,
        RunningStatistics(model, 1),
        observer,
        normalize=lambda images: images / 48,
        precision="fp32",
        num_micro_batches=1,
        label_smoothing=smoothing,
    )
    step.run(iter([(IMAGES, labels)]))
    logits = model(IMAGES / 48)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(engine.losses, [expected.detach()])
    train = observer.meter.read()
    assert train.num_images == 4
    assert train.top1 == (logits.argmax(1) == LABELS).float().mean()
