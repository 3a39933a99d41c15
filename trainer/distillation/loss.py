"""Compute the distillation loss, and what is reported of it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bitfleet.trainer.distillation.config import DistillConfig

MEASURES = ("distillation_loss", "teacher_agreement")
"""Reported means per image: the cross-entropy with the teacher, and the fraction of images for
which both networks prefer the same class."""


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the mean over images of -sum(p log q), 0-dim.

    Args:
        logits: of the student, float32 [N, classes]; q is the softmax of logits / temperature.
        teacher_logits: float32 [N, classes]; p likewise.
        temperature: positive.
    """
    return F.cross_entropy(logits / temperature, torch.softmax(teacher_logits / temperature, dim=1))


def distillation_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor, config: DistillConfig, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise, 0-dim, and the values of MEASURES, float32 [2], detached.

    Args:
        logits: of the student, float32 [N, classes].
        labels: int64 [N], or shares of the classes, float32 [N, classes].
        teacher_logits: float16 [N, classes].
        config: temperature and weights.
        label_smoothing: `DataConfig.label_smoothing`.
    """
    soft = soft_cross_entropy(logits, teacher_logits.float(), config.temperature)
    loss = soft if config.soft_weight == 1 else config.soft_weight * soft
    if config.label_weight:
        loss = loss + config.label_weight * F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    with torch.no_grad():
        agreement = (logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
        return loss, torch.stack([soft.detach(), agreement])
