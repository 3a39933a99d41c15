"""Draw a run's metrics.jsonl: `python docs/plot_run.py RUN OUTPUT.png`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bitfleet.optim import RULES
from bitfleet.trainer.metrics import read_metrics


def series(lines: list[dict[str, float]], kind: str, key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of `key` in the lines of `kind`."""
    chosen = [line for line in lines if line["kind"] == kind and key in line]
    return [line["step"] for line in chosen], [line[key] for line in chosen]


def plot(run: Path, output: Path) -> None:
    """Draw accuracy, loss, flip ratio and schedules of `run` over its steps."""
    lines = read_metrics(run)
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.3), constrained_layout=True)
    for axis, key, scale in ((axes[0], "top1", 100.0), (axes[1], "loss", 1.0)):
        for kind, color, width in (("train", "#9ecae1", 1.0), ("validation", "#d94801", 2.0)):
            steps, values = series(lines, kind, key)
            axis.plot(steps, [scale * value for value in values], color=color, linewidth=width, label=kind)
    steps, values = series(lines, "validation", "top1")
    axes[0].annotate(f"{100 * values[-1]:.1f} %", (steps[-1], 78), ha="right", color="#d94801")
    axes[0].set_title("top-1, %")
    axes[0].set_ylim(50, 100)
    axes[1].set_title("loss")
    axes[1].set_ylim(0, 1.2)
    layers = sorted({key for line in lines for key in line if key.startswith("flip_ratio/")})
    for index, key in enumerate(layers):
        steps, values = series(lines, "train", key)
        shade = plt.get_cmap("viridis")(index / max(len(layers) - 1, 1))
        axes[2].plot(steps, values, color=shade, linewidth=0.6, alpha=0.6)
    steps, values = series(lines, "train", "flip_ratio")
    axes[2].plot(steps, values, color="black", linewidth=1.5, label="all layers")
    axes[2].set_title("flip ratio of a step")
    axes[2].set_yscale("log")
    for key in dict.fromkeys(key for rule in RULES.values() for key in rule.scheduled):
        steps, values = series(lines, "train", key)
        if values:
            axes[3].plot(steps, values, label=key)
    axes[3].set_title("schedules")
    axes[3].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
