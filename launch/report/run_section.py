"""Write the part of the page about a run: its pictures, tables and configuration."""

from typing import Any

import numpy as np
import numpy.typing as npt

from bitfleet.launch.report import drawing
from bitfleet.launch.report.drawing import FONT, GREY, MAX_LINES, End
from bitfleet.launch.report.page import Block, Section, Table, picture
from bitfleet.launch.report.published import published_blocks
from bitfleet.launch.report.run_journal import read_journal
from bitfleet.launch.report.run_results import RunResults, answer, summary
from bitfleet.launch.report.sweep_results import Curve, show
from bitfleet.trainer.journal.format import FOLDER

TRAIN, VALIDATION, BLACK = "#7fb3d8", "#d94801", "#222222"
QUANTILES = (0.1, 0.5, 0.9)
DIAGNOSTICS = {
    "dead_band": "inside the dead band: |r| ≤ threshold",
    "never_flipped": "never flipped since the start",
    "oscillators": "oscillators: ≥ 4 flips in 100 steps",
    "sign_agreement": "gradient agrees in sign with its average",
}
"""Fractions of the binary weights in lines of the kind "diagnostics" -> their titles."""


def run_section(run: RunResults, key: str) -> Section:
    """Return everything about a run."""
    bits = "Fractions of the binary weights: all in black, layers from the first (dark) to the last (light)."
    ratios = (
        "Distribution of |r| over the binary weights. Those right of the threshold flip if the sign agrees; "
        "those left of it are in the dead band."
    )
    blocks = [
        *picture("Learning", "learning", draw_learning(run)),
        *picture("Flips", "flips", draw_flips(run.curve("train", "flip_ratio"), run.layers("train", "flip_ratio"))),
        *journal_blocks(run),
        *picture("Diagnostics of the bits", "diagnostics", draw_diagnostics(run), bits),
        *picture("The ratio that is compared with the threshold", "ratios", draw_ratios(run), ratios),
        *picture("Schedules", "schedules", draw_schedules(run)),
        *picture("Speed", "speed", draw_speed(run)),
        *_layers(run),
        *_published(run),
        Block(heading="Configuration", table=Table(header=("", ""), rows=summary(run), num_words=2)),
    ]
    return Section(key=key, title=run.name, answer=answer(run), blocks=blocks)


def _layers(run: RunResults) -> list[Block]:
    """Return the table of the last diagnostics of each layer."""
    last = run.last("diagnostics")
    keys = [key for key in ("flip_ratio", *DIAGNOSTICS) if key in last]
    names = [name.removeprefix("flip_ratio") for name in last if name.startswith("flip_ratio/")]
    if not keys or not names:
        return []
    rows = [(name[1:] or "all", *(_percent(last.get(key + name)) for key in keys)) for name in ("", *names)]
    header = ("layer", *(key.replace("_", " ") for key in keys))
    table = Table(header=header, rows=rows, strong=frozenset({0}))
    return [Block(heading=f"Bits of each layer after step {last['step']:,}, %", table=table)]


def _percent(value: object) -> str:
    return f"{100 * value:.3g}" if isinstance(value, (int, float)) else "-"


def _published(run: RunResults) -> list[Block]:
    model, data, last = run.config.get("model", {}), run.config.get("data", {}), run.last("validation")
    name = f"{run.name}, after step {last['step']:,}" if last else run.name
    row = (name, _percent(last.get("top1")), _percent(last.get("top5")))
    return published_blocks(str(model.get("name")), int(model.get("num_classes", 0)), str(data.get("root")), row)


def journal_blocks(run: RunResults) -> list[Block]:
    """Return flips over time and age of the weights from the journal of a run, if it has one."""
    if not (run.path / FOLDER).is_dir():
        return []
    try:
        journal = read_journal(run.path)
    except ValueError as error:
        return [Block(heading="Flip journal", text=f"The flip journal cannot be read: {error}.")]
    order = list(run.layers("train", "flip_ratio"))  # of the model; the journal has that of the buckets
    names = sorted(journal.flips, key=lambda name: order.index(name) if name in order else len(order))
    span = journal.last_step - journal.first_step
    ages = {name: journal.last_step - journal.last_flips[name] for name in names}
    everything = np.concatenate(list(ages.values()))
    rows = [_row("all", everything, sum(int(flips.sum()) for flips in journal.flips.values()), span)]
    rows += [_row(name, ages[name], int(journal.flips[name].sum()), span) for name in names]
    text = (
        f"Steps {journal.first_step + 1:,} to {journal.last_step:,}. The age of a weight is the number of steps "
        f"since its last flip; without a flip in the journal it is {span:,}."
    )
    header = (
        "layer",
        "weights",
        "flips per weight",
        *(f"{part:.0%} are younger than" for part in QUANTILES),
        "never flipped, %",
    )
    table = Table(header=header, rows=rows, strong=frozenset({0}))
    flips = draw_flips(journal.ratios(*names), {name: journal.ratios(name) for name in names})
    return [
        *picture("Flip journal: flips over time", "journal-flips", flips, f"Means over {journal.interval} step(s)."),
        *picture("Flip journal: age of the weights", "journal-ages", _draw_ages(everything), text, table),
    ]


def _row(name: str, ages: npt.NDArray[np.int64], num_flips: int, span: int) -> tuple[str, ...]:
    quantiles = (f"{age:,.0f}" for age in np.quantile(ages, QUANTILES))
    return name, f"{ages.size:,}", f"{num_flips / ages.size:.3g}", *quantiles, f"{100 * np.mean(ages == span):.3g}"


def _draw_ages(ages: npt.NDArray[np.int64]) -> bytes:
    (axis,) = drawing.panels(1, width=8.6, height=3.2)
    oldest = int(ages.max())
    counts, edges = np.histogram(ages, bins=min(50, oldest + 1), range=(-0.5, oldest + 0.5))
    axis.stairs(counts / ages.size, edges, fill=True, color=TRAIN)
    drawing.percent(axis, 0.0, float(counts.max() / ages.size))
    drawing.title(axis, "steps since the last flip; the last bar holds the weights that never flipped")
    return drawing.png([axis])


def _plot(axis: Any, curve: Curve, color: str, width: float, style: str = "default") -> None:
    marker = "o" if len(curve.steps) < 3 else None
    axis.plot(*curve, color=color, linewidth=width, marker=marker, markersize=4, drawstyle=style)


def draw_learning(run: RunResults) -> bytes:
    """Draw top-1 and loss over the steps, training and validation."""
    axes = drawing.panels(2, width=5.0, height=3.4)
    for axis, key, name in zip(axes, ("top1", "loss"), ("top-1", "loss"), strict=True):
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
        drawing.steps(axis)
        if key == "top1" and values:
            drawing.percent(axis, min(values), max(values))
        drawing.title(axis, name)
        drawing.label_ends(axis, ends, font=FONT)
    return drawing.png(axes)


def draw_flips(whole: Curve, layers: dict[str, Curve]) -> bytes | None:
    """Draw the flip ratio of all binary weights and of each layer on a logarithmic scale; None
    without flips."""
    shown = [value for curve in (whole, *layers.values()) for value in curve.values if value > 0]
    if not any(value > 0 for value in whole.values):
        return None
    (axis,) = axes = drawing.panels(1, width=8.6, height=4.2)
    ends = _draw_layers(axis, _above_zero(whole), {name: _above_zero(curve) for name, curve in layers.items()})
    axis.set_ylim(min(shown) / 1.5, max(shown) * 1.5)
    drawing.logarithmic(axis)
    drawing.steps(axis)
    axis.set_ylabel("fraction of the weights that flip in a step", fontsize=FONT)
    drawing.title(axis, "flip ratio: all binary weights in black, layers from the first (dark) to the last (light)")
    drawing.label_ends(axis, ends)
    return drawing.png(axes)


def _above_zero(curve: Curve) -> Curve:
    kept = [(step, value) for step, value in zip(*curve, strict=True) if value > 0]
    return Curve(tuple(step for step, _ in kept), tuple(value for _, value in kept))


def _draw_layers(axis: Any, whole: Curve, layers: dict[str, Curve], style: str = "default") -> list[End]:
    """Draw all layers and the whole; of many layers, label the first and the last."""
    ends = []
    for number, ((name, curve), color) in enumerate(
        zip(layers.items(), drawing.ordered_colors(len(layers)), strict=True)
    ):
        if curve.steps:
            _plot(axis, curve, color, 0.9, style)
            if len(layers) < MAX_LINES or number in (0, len(layers) - 1):
                ends.append(End(curve.steps[-1], curve.values[-1], name.removesuffix(".weight"), color))
    if whole.steps:
        _plot(axis, whole, BLACK, 2.0, style)
        ends.append(End(whole.steps[-1], whole.values[-1], "all", BLACK))
    return ends


def draw_schedules(run: RunResults) -> bytes | None:
    """Draw every scheduled hyperparameter in its own panel; None if none was logged."""
    names = run.hyperparameters
    if not names:
        return None
    axes = drawing.panels(len(names), width=3.4, height=2.5, columns=4)
    for axis, name in zip(axes, names, strict=True):
        curve = run.curve("train", name)
        _plot(axis, curve, VALIDATION, 1.6)
        low, high = min(curve.values), max(curve.values)
        drawing.steps(axis)
        if low > 0:
            axis.set_ylim(low / 1.6, high * 1.6)
            drawing.logarithmic(axis)
        first, last = (show(float(f"{value:.2g}")) for value in (curve.values[0], curve.values[-1]))
        drawing.title(axis, f"{name}: {first} → {last}")
    return drawing.png(axes)


def draw_speed(run: RunResults) -> bytes | None:
    """Draw images/s and the fraction of time spent waiting for data; None if they were not
    logged."""
    speed, wait, seconds = (run.curve("train", key) for key in ("images_per_second", "data_wait_seconds", "seconds"))
    if not speed.steps:
        return None
    both = len(wait.steps) == len(seconds.steps) > 0
    axes = drawing.panels(2 if both else 1, width=5.0, height=2.7)
    _plot(axes[0], speed, BLACK, 1.2)
    axes[0].set_ylim(0, 1.1 * max(speed.values) or 1)  # 0 where every step was skipped
    drawing.title(axes[0], f"images/s; median {np.median(speed.values):,.0f}")
    if both:
        parts = tuple(w / s if s > 0 else 0.0 for w, s in zip(wait.values, seconds.values, strict=True))
        _plot(axes[1], Curve(wait.steps, parts), BLACK, 1.2)
        drawing.percent(axes[1], 0.0, max(parts))
        drawing.title(axes[1], f"time spent waiting for data; median {100 * np.median(parts):.1f} %")
    for axis in axes:
        drawing.steps(axis)
    return drawing.png(axes)


def draw_diagnostics(run: RunResults) -> bytes | None:
    """Draw fractions of the binary weights over the steps, all and per layer; None if no
    diagnostics were logged."""
    keys = [key for key in DIAGNOSTICS if run.curve("diagnostics", key).steps]
    if not keys:
        return None
    axes = drawing.panels(len(keys), width=5.0, height=3.2)
    for axis, key in zip(axes, keys, strict=True):
        whole, layers = run.curve("diagnostics", key), run.layers("diagnostics", key)
        # Oscillators are counted per window of 100 steps.
        style = "steps-post" if key == "oscillators" else "default"
        ends = _draw_layers(axis, whole, layers, style)
        values = [value for curve in (whole, *layers.values()) for value in curve.values]
        drawing.percent(axis, min(values), max(values))
        drawing.steps(axis)
        drawing.title(axis, DIAGNOSTICS[key])
        drawing.label_ends(axis, ends)
    return drawing.png(axes)


def draw_ratios(run: RunResults) -> bytes | None:
    """Draw histograms of log10 |r| from early to late with the threshold of each step; None if none
    was logged."""
    lines = [line for line in run.lines if line["kind"] == "diagnostics" and "log_ratio" in line]
    if not lines:
        return None
    chosen = [lines[index] for index in sorted({0, len(lines) // 2, len(lines) - 1})]
    axes = drawing.panels(len(chosen), width=3.8, height=2.9, columns=3)
    for axis, line in zip(axes, chosen, strict=True):
        edges, counts = np.asarray(line["log_ratio"]["edges"], float), np.asarray(line["log_ratio"]["counts"], float)
        whole = max(counts.sum(), 1.0)
        axis.stairs(counts / whole, edges, fill=True, color=TRAIN)
        drawing.percent(axis, 0.0, 1.12 * float(counts.max() / whole))
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
        drawing.title(axis, f"step {line['step']:,}")
    return drawing.png(axes)
