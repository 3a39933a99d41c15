"""Draw the diagnostics of a run: `python docs/plot_diagnostics.py RUN OUTPUT.png`."""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bitfleet.trainer.metrics import read_metrics

PANELS = {
    "flip_ratio": "flipped in this step",
    "never_flipped": "never flipped so far",
    "oscillators": "flipped 4 times or more\nin the last whole window of 100 steps",
    "dead_band": "inside the dead band, |r| <= threshold",
    "sign_agreement": "gradient has the sign of its average",
}


def plot(run: Path, output: Path) -> None:
    """Draw a panel per number with a line per layer, and the histogram of |r| over the steps."""
    lines: list[dict[str, Any]] = [line for line in read_metrics(run) if line["kind"] == "diagnostics"]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.4), constrained_layout=True)
    for axis, (key, title) in zip(axes.flat, PANELS.items(), strict=False):
        style = "steps-post" if key == "oscillators" else "default"
        layers = [name for name in lines[-1] if name.startswith(f"{key}/")]
        for index, layer in enumerate(layers):
            chosen = [line for line in lines if layer in line]
            shade = plt.get_cmap("viridis")(index / max(len(layers) - 1, 1))
            label = layer.split("/")[1].removesuffix(".conv.weight") if index in (0, len(layers) - 1) else None
            axis.plot(
                [line["step"] for line in chosen],
                [line[layer] for line in chosen],
                color=shade,
                linewidth=0.8,
                drawstyle=style,
                label=label,
            )
        chosen = [line for line in lines if key in line]
        axis.plot(
            [line["step"] for line in chosen],
            [line[key] for line in chosen],
            color="black",
            linewidth=1.6,
            drawstyle=style,
            label="all layers",
        )
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, lines[-1]["step"])
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 0].set_yscale("log")
    axes[0, 0].legend(frameon=False, fontsize=8)
    _histogram(axes[1, 2], lines)
    figure.savefig(output, dpi=80)


def _histogram(axis: Any, lines: list[dict[str, Any]]) -> None:
    counts = np.array([line["log_ratio"]["counts"] for line in lines], dtype=float).T
    occupied = np.flatnonzero((counts > 0).any(axis=1))
    first, last = occupied[0], occupied[-1]
    edges = np.array(lines[0]["log_ratio"]["edges"])[first : last + 2]
    share = counts[first : last + 1] / counts.sum(axis=0)
    steps = [0, *(line["step"] for line in lines)]
    mesh = axis.pcolormesh(steps, edges, np.ma.masked_equal(share, 0.0), cmap="viridis", norm="log")
    axis.figure.colorbar(mesh, ax=axis, label="share of the weights")
    axis.plot([line["step"] for line in lines], np.log10([line["threshold"] for line in lines]), color="#d94801")
    axis.annotate(
        "threshold",
        (lines[-1]["step"], np.log10(lines[-1]["threshold"])),
        xytext=(-4, 5),
        textcoords="offset points",
        color="black",
        backgroundcolor="#ffffffb0",
        ha="right",
    )
    axis.set_title("log10 |r|, which is compared with the threshold", fontsize=10)
    axis.set_xlabel("step")


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
