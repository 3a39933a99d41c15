import math

import pytest
import torch
from torch import Tensor

from bitfleet.trainer.distillation.config import DistillConfig
from bitfleet.trainer.distillation.loss import distillation_loss, soft_cross_entropy

STUDENT = (torch.arange(24.0).view(4, 6) * 0.7).sin() * 3
TEACHER = (torch.arange(24.0).view(4, 6) * 1.3).cos() * 4
LABELS = torch.tensor([0, 5, 2, 2])
GOLDEN_LOSS = 3.0830259323120117
GOLDEN_GRADIENT = [-0.114167, 0.0332598, 0.1103278, 0.0763865, 0.0013775, -0.1071846]


def cross_entropy(p: Tensor, logits: Tensor) -> float:
    """Return -sum(p log softmax(logits)), the mean over rows, by Python's own arithmetic."""
    total = 0.0
    for weights, row in zip(p.tolist(), logits.tolist(), strict=True):
        normalizer = math.log(sum(map(math.exp, row)))
        total -= sum(w * (x - normalizer) for w, x in zip(weights, row, strict=True))
    return total / len(p)


def test_loss_and_gradient_are_those_of_the_official_code() -> None:
    """DistributionLoss of liuzechun/ReActNet (f89e570, utils/KD_loss.py), run with torch 2.14."""
    student = STUDENT.clone().requires_grad_()
    loss = soft_cross_entropy(student, TEACHER, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN_LOSS, rel=1e-6)
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx(GOLDEN_GRADIENT, abs=1e-6)


@pytest.mark.parametrize(("temperature", "label_weight"), [(1.0, 0.0), (1.0, 0.3), (4.0, 0.0), (2.5, 0.9)])
def test_loss_is_the_weighted_sum(temperature: float, label_weight: float) -> None:
    config = DistillConfig(teacher="resnet34", temperature=temperature, label_weight=label_weight)
    teacher = torch.cat([STUDENT[:1] - 1, TEACHER[1:]]).half()
    loss, measured = distillation_loss(STUDENT, LABELS, teacher, config)
    soft = cross_entropy(torch.softmax(teacher.double() / temperature, 1), STUDENT / temperature)
    hard = cross_entropy(torch.eye(6)[LABELS], STUDENT)
    assert loss.item() == pytest.approx(label_weight * hard + (1 - label_weight) * temperature**2 * soft, rel=1e-6)
    assert measured.tolist() == pytest.approx([soft, 1 / 4], rel=1e-6)


def test_gradients_keep_their_size_at_any_temperature() -> None:
    """Near agreement the gradient is the same for all high temperatures (Hinton et al. 2015)."""
    norms = []
    for temperature in (30.0, 60.0):
        student = (0.1 * STUDENT).requires_grad_()
        config = DistillConfig(teacher="resnet34", temperature=temperature)
        loss, _ = distillation_loss(student, LABELS, TEACHER.half(), config)
        loss.backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_the_teacher_gets_no_gradient_and_the_measures_none() -> None:
    student = STUDENT.clone().requires_grad_()
    loss, measured = distillation_loss(student, LABELS, TEACHER.half(), DistillConfig(teacher="resnet34"))
    assert loss.requires_grad
    assert not measured.requires_grad
