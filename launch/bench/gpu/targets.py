"""What a GPU has to show: the targets of docs/gpu.md, and what `bitfleet bench gpu` measured for each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bitfleet.launch.bench.gpu.rows import Row

Measured = Callable[[Sequence[Row]], float | None]
BI_REAL, XNOR, REFERENCE = "birealnet18", "xnornet", "resnet18"
ON_BITS = "kernel on bits, fp32 gradients"
MEAN_DIFFERENCE = {"torchvision": 1.0, "official": 2.0}
"""Of pixels that the GPU and the CPU decode, of 255, by data.preprocessing: a prediction. For "official" the CPU decodes with
libjpeg's fast transform, as TensorFlow does, which no GPU has: with Pillow's the difference is 1.2."""
BINARYNET_STEP = "binarynet_cifar10, loader memory, CUDA graph"


class Target(NamedTuple):
    """One line of the last table."""

    title: str
    bound: float
    is_least: bool
    """Whether the bound is the least that will do, or the most."""
    measured: Measured
    """From the results; None where they do not say it."""

    def goal(self) -> str:
        """The bound in words."""
        if not self.is_least and self.bound == 0:
            return "0"
        return f"at {'least' if self.is_least else 'most'} {self.bound:g}"

    def is_met(self, value: float) -> bool:
        """Whether `value` will do."""
        return value >= self.bound if self.is_least else value <= self.bound


def facts(rows: Sequence[Row], part: str, what: str, name: str, **where: Any) -> list[Any]:
    """The fact `name` of all results called `what` of a part whose other facts are `where`."""
    return [
        row[name]
        for row in rows
        if row["part"] == part
        and row["what"] == what
        and name in row
        and all(row.get(key) == value for key, value in where.items())
    ]


def _trajectories(rows: Sequence[Row]) -> float | None:
    flips = facts(rows, "rule", "recorded trajectory", "steps_with_other_flips")
    bits = facts(rows, "rule", "recorded trajectory", "first_difference")
    return sum(flip or 0 for flip in flips) + sum(map(bool, bits)) if flips else None


def _wild(rows: Sequence[Row]) -> float | None:
    found = facts(rows, "rule", "wild gradients", "first_difference")
    return sum(map(bool, found)) if found else None


def _repeated(rows: Sequence[Row]) -> float | None:
    found = [
        count
        for network in (BI_REAL, XNOR)
        for count in facts(rows, "repeat", network, "different_gradients", deterministic=True)
    ]
    return sum(found) if found else None


def _syncs(rows: Sequence[Row]) -> float | None:
    found = [
        total
        for what in ("host syncs per step", "pageable copies per step")
        for variant in ("memory", "memory, CUDA graph")
        for config in ("binarynet_cifar10", "fashion_quickstart")
        for total in facts(rows, "trainer", what, "total", run=f"{config}, loader {variant}")
    ]
    return max(found) if found else None


def _update(name: str) -> Measured:
    return _most("update", ON_BITS, name, numel=62_000_000)


def _of_resnet(network: str) -> Measured:
    setting = {"batch_size": 256, "precision": "bf16", "is_compiled": True, "deterministic": False}

    def measured(rows: Sequence[Row]) -> float | None:
        own, other = (facts(rows, "networks", name, "images_per_second", **setting) for name in (network, REFERENCE))
        return own[0] / other[0] if own and other else None

    return measured


def _most(part: str, what: str, name: str, **where: Any) -> Measured:
    def measured(rows: Sequence[Row]) -> float | None:
        found = facts(rows, part, what, name, **where)
        return max(found) if found else None

    return measured


def _pixels(preprocessing: str) -> Measured:
    return _most("dali", "pixels, GPU against CPU", "mean", preprocessing=preprocessing)


TARGETS = (
    Target("recorded trajectories: steps with other flips, tensors with other bits than the CPU's", 0, False, _trajectories),
    Target("wild gradients: rules with other bits than the CPU's", 0, False, _wild),
    Target("gradients that differ when a step is repeated, engine.deterministic", 0, False, _repeated),
    Target("host synchronisations per step, images in memory", 0, False, _syncs),
    Target("update on bits, 62 M weights: share of a copy's bandwidth", 0.8, True, _update("of_copy_bandwidth")),
    Target("update on bits, 62 M weights: time over fused AdamW's", 0.75, False, _update("time_to_adamw")),
    Target("Bi-Real Net 18, compiled, bf16: images/s over resnet18's", 0.9, True, _of_resnet(BI_REAL)),
    Target("XNOR-Net, compiled, bf16: images/s over resnet18's", 1.8, True, _of_resnet(XNOR)),
    Target("BinaryNet, CUDA graph: ms per step of 50 images", 1.2, False, _most("trainer", "step", "ms", run=BINARYNET_STEP)),
    *(
        Target(f"DALI, {name}: mean difference of pixels, GPU to CPU, of 255", bound, False, _pixels(name))
        for name, bound in MEAN_DIFFERENCE.items()
    ),
    Target("DALI: batches with other pixels under load", 0, False, _most("dali", "races under load", "different_batches")),
)  # fmt: skip


def format_targets(rows: Sequence[Row]) -> str:
    """The last table: what was to be reached, and what was measured."""
    width = max(len(target.title) for target in TARGETS)
    lines = ["", "== targets"]
    for target in TARGETS:
        value = target.measured(rows)
        shown = "not measured" if value is None else f"{value:.4g} {'met' if target.is_met(value) else 'NOT MET'}"
        lines.append(f"  {target.title:<{width}}  {target.goal():>13}  {shown}")
    num_errors = sum("error" in row for row in rows)
    if num_errors:
        lines.append(f"  {num_errors} errors: the lines with ERROR above, whole in the file of the results")
    return "\n".join(lines)
