"""Train a network on the predictions of another one, the teacher."""

from bitfleet.trainer.distillation.cache import LogitCache, identity_of_logits, open_cache
from bitfleet.trainer.distillation.config import DistillConfig
from bitfleet.trainer.distillation.distillation import Distillation, Schedule
from bitfleet.trainer.distillation.loss import MEASURES
from bitfleet.trainer.distillation.teacher import Teacher, file_sha256, load_teacher, precision_on

__all__ = [
    "MEASURES",
    "DistillConfig",
    "Distillation",
    "LogitCache",
    "Schedule",
    "Teacher",
    "file_sha256",
    "identity_of_logits",
    "load_teacher",
    "open_cache",
    "precision_on",
]
