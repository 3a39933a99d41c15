"""The diagnostics of bits in TensorBoard: a group of charts for each number, one chart with all layers, the histogram of |r|."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfleet.optim.diagnostics import KEYS, LOG_RATIO, PI

if TYPE_CHECKING:  # it takes a second to import, and only rank 0 needs it
    from torch.utils.tensorboard import SummaryWriter

GROUP = "diagnostics"


def show_diagnostics(writer: "SummaryWriter", step: int, values: Mapping[str, Any], *, with_layout: bool) -> None:
    """Write `values` of `BitDiagnostics` after `step` optimizer steps.

    Overall values are diagnostics/<key>, those of a parameter <key>/<parameter>.

    Args:
        writer: of the run.
        step: optimizer steps done.
        values: what metrics.jsonl gets.
        with_layout: write also, once a file, which values the tab "custom scalars" shows in one chart.
    """
    if with_layout:
        writer.add_custom_scalars({GROUP: {key: ["Multiline", [f"{key}/.*"]] for key in (*KEYS, PI)}})
    for key, value in values.items():
        if key == LOG_RATIO:
            _show_histogram(writer, step, value["edges"], value["counts"])
        elif key != "since":
            writer.add_scalar(key if "/" in key else f"{GROUP}/{key}", value, step)


def _show_histogram(writer: "SummaryWriter", step: int, edges: Sequence[float], counts: Sequence[int]) -> None:
    """Counts between `edges`; moments, which TensorBoard asks for, are those of the bins' centres."""
    number, limit = np.array(counts, dtype=np.float64), np.array(edges)
    centre = (limit[1:] + limit[:-1]) / 2
    (occupied,) = number.nonzero()
    writer.add_histogram_raw(
        f"{GROUP}/{LOG_RATIO}",
        min=limit[occupied[0]],
        max=limit[occupied[-1] + 1],
        num=int(number.sum()),
        sum=float(number @ centre),
        sum_squares=float(number @ centre**2),
        bucket_limits=limit[1:].tolist(),
        bucket_counts=number.tolist(),
        global_step=step,
    )
