"""Measure a run, and write what is measured."""

from bitfleet.trainer.metrics.accuracy import Accuracy, AccuracyMeter
from bitfleet.trainer.metrics.config import MetricsConfig
from bitfleet.trainer.metrics.reports import LossWatch, Reports
from bitfleet.trainer.metrics.step_observer import StepObserver, StepReport, hyperparameters_of, step_flips
from bitfleet.trainer.metrics.writer import JSONL, MetricsWriter, read_metrics

__all__ = [
    "JSONL",
    "Accuracy",
    "AccuracyMeter",
    "LossWatch",
    "MetricsConfig",
    "MetricsWriter",
    "Reports",
    "StepObserver",
    "StepReport",
    "hyperparameters_of",
    "read_metrics",
    "step_flips",
]
