"""The targets of docs/gpu.md, and the figures of `bitfleet bench gpu` for each."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bitfleet.launch.bench.results import Row
from bitfleet.launch.bench.step import ON_BITS
from bitfleet.launch.text import table

BINARYNET_STEP = "loader memory, CUDA graph"
FASTEST = {"batch_size": 256, "precision": "bf16", "is_compiled": True, "deterministic": False}
LARGE = {"numel": 62_000_000}


class Target(NamedTuple):
    """A bound for the worst of a figure over all results of a kind."""

    goal: str
    """"0", "at least X" or "at most X"."""
    part: str
    what: str = "tests"
    """Name of the results."""
    figure: str = "failed"
    where: Mapping[str, Any] | None = None
    """Other figures that the results must have."""

    def value(self, rows: Sequence[Row]) -> float | None:
        """Return the worst figure; None if no result has it."""
        wanted = {"part": self.part, "what": self.what, **(self.where or {})}
        values = [row[self.figure] for row in rows if wanted.items() <= row.items() and self.figure in row]
        worst = min if self.goal.startswith("at least") else max
        return float(worst(values)) if values else None

    def is_met(self, value: float) -> bool:
        """Return whether `value` meets the goal."""
        bound = float(self.goal.split()[-1])
        return value >= bound if self.goal.startswith("at least") else value <= bound


TARGETS = {
    "update rules: tests with other flips than recorded, or other bits than the CPU's": Target("0", "rule"),
    "gradients that differ from the CPU's, and sums of bits that are not exact: tests": Target("0", "gradients"),
    "gradients that differ when a step is repeated, engine.deterministic: tests": Target("0", "repeat"),
    "host synchronisations in a step, images in memory: tests": Target("0", "waits"),
    "update on bits, 62 M weights: share of a copy's bandwidth": Target(
        "at least 0.8", "update", ON_BITS, "of_copy_bandwidth", LARGE
    ),
    "update on bits, 62 M weights: time over fused AdamW's": Target(
        "at most 0.75", "update", ON_BITS, "time_to_adamw", LARGE
    ),
    "Bi-Real Net 18, compiled, bf16: images/s over resnet18's": Target(
        "at least 0.9", "networks", "birealnet18", "of_resnet18", FASTEST
    ),
    "XNOR-Net, compiled, bf16: images/s over resnet18's": Target(
        "at least 1.8", "networks", "xnornet", "of_resnet18", FASTEST
    ),
    "BinaryNet, CUDA graph: ms per step of 50 images": Target(
        "at most 1.2", "trainer", "step", "ms", {"run": BINARYNET_STEP}
    ),
    "DALI: tests with pixels that are not close to the CPU's, or change under load": Target("0", "pixels"),
}
"""By title. A goal of 0 is for the tests that failed."""


def format_targets(rows: Sequence[Row]) -> str:
    """Return the last table: every target and the figure for it."""
    cells = []
    for title, target in TARGETS.items():
        value = target.value(rows)
        verdict = "not measured" if value is None else f"{value:.4g} {'met' if target.is_met(value) else 'NOT MET'}"
        cells.append(["", title, target.goal, verdict])
    num_errors = sum("error" in row for row in rows)
    errors = f"\n  {num_errors} errors: the lines with ERROR above, in full in the file of the results"
    return f"\n== targets\n{table(cells, '<<><')}{errors * bool(num_errors)}"
