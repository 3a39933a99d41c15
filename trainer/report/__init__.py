"""Sweeps and runs as one HTML page with pictures."""

from bitfleet.trainer.report.report import write_report

__all__ = ["write_report"]
