"""Sweeps and runs as one HTML page with pictures."""

from bitfleet.launch.report.report import write_report

__all__ = ["write_report"]
