"""Pictures of a run: accuracy, loss, flips, diagnostics of bits, schedules, speed."""

from typing import Any

import numpy as np

from bitfleet.launch.report.drawing import (
    FONT,
    GREY,
    MAX_LINES,
    End,
    label_ends,
    logarithmic,
    ordered_colors,
    panels,
    percent,
    png,
    steps,
    title,
)
from bitfleet.launch.report.run_results import DIAGNOSTICS, RunResults
from bitfleet.launch.report.sweep_results import Curve, show

TRAIN, VALIDATION, BLACK = "#7fb3d8", "#d94801", "#222222"


def _plot(axis: Any, curve: Curve, color: str, width: float, *, jumps: bool = False) -> None:
    style = "steps-post" if jumps else "default"
    axis.plot(
        *curve,
        color=color,
        linewidth=width,
        marker="o" if len(curve.steps) < 3 else None,
        markersize=4,
        drawstyle=style,
    )


def draw_learning(run: RunResults) -> bytes:
    """Top-1 and loss over the steps, training and validation."""
    picture = panels(2, width=5.0, height=3.4)
    for axis, key, name in zip(picture.axes, ("top1", "loss"), ("top-1", "loss"), strict=True):
        ends: list[End] = []
        values: list[float] = []
        for kind, color, width in (("train", TRAIN, 1.2), ("validation", VALIDATION, 2.0)):
            curve = run.curve(kind, key)
            if curve.steps:
                _plot(axis, curve, color, width)
                last = f"{100 * curve.values[-1]:.1f} %" if key == "top1" else f"{curve.values[-1]:.3f}"
                word = "training" if kind == "train" else kind
                ends.append(End(curve.steps[-1], curve.values[-1], f"{word}  {last}", color))
                values += curve.values
        steps(axis)
        if key == "top1":
            percent(axis, min(values), max(values))
        title(axis, name)
        label_ends(axis, ends, font=FONT)
    return png(picture.figure)


def draw_flips(run: RunResults) -> bytes | None:
    """Flip ratio of a step on a logarithmic scale: all binary weights, and each layer; None where none was logged."""
    whole, layers = run.curve("train", "flip_ratio"), run.layers("train", "flip_ratio")
    if not any(value > 0 for value in whole.values):
        return None
    picture = panels(1, width=8.6, height=4.2)
    axis = picture.axes[0]
    ends = _draw_layers(axis, whole, layers, logarithmic_scale=True)
    shown = [value for curve in (whole, *layers.values()) for value in curve.values if value > 0]
    axis.set_ylim(min(shown) / 1.5, max(shown) * 1.5)
    logarithmic(axis)
    steps(axis)
    axis.set_ylabel("part of the weights that a step flips", fontsize=FONT)
    title(axis, "flip ratio: all binary weights in black, layers from the first (dark) to the last (light)")
    label_ends(axis, ends)
    return png(picture.figure)


def _draw_layers(
    axis: Any, whole: Curve, layers: dict[str, Curve], *, logarithmic_scale: bool, jumps: bool = False
) -> list[End]:
    """Every layer's curve and the whole; names for all where they are few, else for the first and the last layer."""
    ends = []
    for index, ((name, curve), color) in enumerate(zip(layers.items(), ordered_colors(len(layers)), strict=True)):
        kept = [(x, y) for x, y in zip(*curve, strict=True) if y > 0 or not logarithmic_scale]
        if not kept:
            continue
        part = Curve(tuple(x for x, _ in kept), tuple(y for _, y in kept))
        _plot(axis, part, color, 0.9, jumps=jumps)
        if len(layers) < MAX_LINES or index in (0, len(layers) - 1):
            ends.append(End(part.steps[-1], part.values[-1], name.removesuffix(".weight"), color))
    kept = [(x, y) for x, y in zip(*whole, strict=True) if y > 0 or not logarithmic_scale]
    if kept:
        _plot(axis, Curve(tuple(x for x, _ in kept), tuple(y for _, y in kept)), BLACK, 2.0, jumps=jumps)
        ends.append(End(*kept[-1], "all", BLACK))
    return ends


def draw_schedules(run: RunResults) -> bytes | None:
    """Every scheduled hyperparameter as it was used, a panel each; None where none was logged."""
    names = run.hyperparameters
    if not names:
        return None
    picture = panels(len(names), width=3.4, height=2.5, columns=4)
    for axis, name in zip(picture.axes, names, strict=True):
        curve = run.curve("train", name)
        _plot(axis, curve, VALIDATION, 1.6)
        low, high = min(curve.values), max(curve.values)
        steps(axis)
        if low > 0:
            axis.set_ylim(low / 1.6, high * 1.6)
            logarithmic(axis)
        first, last = (show(float(f"{value:.2g}")) for value in (curve.values[0], curve.values[-1]))
        title(axis, f"{name}: {first} → {last}")
    return png(picture.figure)


def draw_speed(run: RunResults) -> bytes | None:
    """Images/s and the part of the time that waited for data; None where they were not logged."""
    speed, wait, seconds = (run.curve("train", key) for key in ("images_per_second", "data_wait_seconds", "seconds"))
    if not speed.steps:
        return None
    both = len(wait.steps) == len(seconds.steps) > 0
    picture = panels(2 if both else 1, width=5.0, height=2.7)
    _plot(picture.axes[0], speed, BLACK, 1.2)
    picture.axes[0].set_ylim(0, 1.1 * max(speed.values))
    title(picture.axes[0], f"images/s; median {np.median(speed.values):,.0f}")
    if both:
        parts = tuple(w / s if s > 0 else 0.0 for w, s in zip(wait.values, seconds.values, strict=True))
        _plot(picture.axes[1], Curve(wait.steps, parts), BLACK, 1.2)
        percent(picture.axes[1], 0.0, max(parts))
        title(picture.axes[1], f"time spent waiting for data; median {100 * np.median(parts):.1f} %")
    for axis in picture.axes:
        steps(axis)
    return png(picture.figure)


TITLES = {
    "dead_band": "inside the dead band: |r| ≤ threshold",
    "never_flipped": "never flipped since the start",
    "oscillators": "oscillators: ≥ 4 flips in 100 steps",
    "sign_agreement": "gradient agrees in sign with its average",
}


def draw_diagnostics(run: RunResults) -> bytes | None:
    """Fractions of the binary weights over the steps, all and by layer; None where no diagnostics were logged."""
    keys = [key for key in DIAGNOSTICS if run.curve("diagnostics", key).steps]
    if not keys:
        return None
    picture = panels(len(keys), width=5.0, height=3.2)
    for axis, key in zip(picture.axes, keys, strict=True):
        whole, layers = run.curve("diagnostics", key), run.layers("diagnostics", key)
        # Oscillators are counted anew when a window of 100 steps ends.
        ends = _draw_layers(axis, whole, layers, logarithmic_scale=False, jumps=key == "oscillators")
        values = [value for curve in (whole, *layers.values()) for value in curve.values]
        percent(axis, min(values), max(values))
        steps(axis)
        title(axis, TITLES[key])
        label_ends(axis, ends)
    return png(picture.figure)


def draw_ratios(run: RunResults) -> bytes | None:
    """Histograms of log10 |r| from early to late, the threshold of each step marked; None where none was logged."""
    lines = run.histograms()
    if not lines:
        return None
    chosen = [lines[index] for index in sorted({0, len(lines) // 2, len(lines) - 1})]
    picture = panels(len(chosen), width=3.8, height=2.9, columns=3)
    for axis, line in zip(picture.axes, chosen, strict=True):
        edges, counts = np.asarray(line["log_ratio"]["edges"], float), np.asarray(line["log_ratio"]["counts"], float)
        whole = max(counts.sum(), 1.0)
        axis.stairs(counts / whole, edges, fill=True, color=TRAIN)
        percent(axis, 0.0, 1.12 * float(counts.max() / whole))
        axis.set_xlabel("log10 |r|", fontsize=FONT)
        threshold = line.get("threshold", run.threshold_at(line["step"]))
        if threshold > 0:
            mark = float(np.log10(threshold))
            axis.axvline(mark, color=VALIDATION, linewidth=1.5)
            axis.annotate("threshold", (mark, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3),
                          textcoords="offset points", color=VALIDATION, fontsize=FONT - 1, va="top")  # fmt: skip
        else:
            axis.annotate("threshold 0: far left", (0.02, 0.98), xycoords="axes fraction", color=GREY,
                          fontsize=FONT - 1, va="top")  # fmt: skip
        title(axis, f"step {line['step']:,}")
    return png(picture.figure)
