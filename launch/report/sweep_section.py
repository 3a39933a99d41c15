"""Write the part of the page about a sweep."""

import itertools
from collections.abc import Iterable

from bitfleet.launch.report.intervals import WITHIN, Spread, plus_minus, spread
from bitfleet.launch.report.page import Block, Section, Table, picture
from bitfleet.launch.report.published import networks, published_blocks
from bitfleet.launch.report.sweep_findings import Slope, answer, fastest, grids, levels, slopes, speeds
from bitfleet.launch.report.sweep_plots import (
    MAX_ROWS,
    draw_bars,
    draw_curves,
    draw_grids,
    draw_slopes,
    draw_speeds,
    facets,
)
from bitfleet.launch.report.sweep_results import SweepPoint, SweepResults, show

METRICS = {
    "top1": ("Validation accuracy", "top-1", "curves", "heatmap"),
    "flip_ratio": ("Flip ratio", "flip ratio", "flips", "heatmap-flips"),
}
"""Metric -> title, name on an axis, pictures of its curves and grids."""


def sweep_section(results: SweepResults, key: str) -> Section:
    """Return everything about a sweep."""
    figure, blocks = results.figure, list[Block]()
    if figure.bars:
        cut = f"The best {MAX_ROWS} of {len(results.points)} points." if len(results.points) > MAX_ROWS else ""
        blocks += picture("Accuracy at the end, all seeds", "top1", draw_bars(results), cut)
    tables = grids(results)
    for metric in figure.metrics if tables else ():
        _, name, _, file = METRICS.get(metric, (metric, metric, metric, f"heatmap-{metric}"))
        unit = f"{name}, %" if metric == "top1" else f"last {name}"
        blocks += picture(f"Two axes: {unit}", file, draw_grids(results, tables, metric, unit))
    if figure.curves:
        blocks += [*_curves(results), *_convergence(results)]
    blocks += [*_robustness(results), *_published(results), _points(results), *_unfinished(results), _facts(results)]
    return Section(key=key, title=results.title, question=results.question, answer=answer(results), blocks=blocks)


def _curves(results: SweepResults) -> Iterable[Block]:
    text = "Lines are means over the seeds, bands ± one standard deviation."
    num_drawn = len({point.labels for facet in facets(results) for point in facet.points})
    if num_drawn < len(results.ranked):
        text += f" The best {num_drawn} points are drawn."
    for metric in results.figure.metrics:
        title, name, file, _ = METRICS.get(metric, (metric, metric, metric, ""))
        yield from picture(f"{title} over the steps", file, draw_curves(results, metric, name), text)


def _convergence(results: SweepResults) -> list[Block]:
    accuracies = levels(results)
    rows = []
    for point in results.points if accuracies else ():
        cells = [
            plus_minus(speed.steps, 1.0, 0)
            + (f" ({len(speed.reached)} of {speed.num})" if len(speed.reached) < speed.num else "")
            for speed in speeds(point, accuracies)
        ]
        rows += [(point.name, *cells)] if point.finished else []
    text = (
        f"{fastest(results)} The accuracies are near 80, 90 and 95 % of the best point's at the end; "
        "steps are counted to the first validation that reaches them. (1 of 3): "
        "number of seeds that reach it, over which the mean is taken."
    )
    table = Table(header=("point", *(f"steps to {100 * level:.0f} %" for level in accuracies)), rows=rows)
    return picture("Convergence: steps to an accuracy", "convergence", draw_speeds(results, accuracies), text, table)


def _robustness(results: SweepResults) -> list[Block]:
    lines = slopes(results)
    if not lines:
        return []
    text = (
        f"Width of the region in which top-1 (mean over the seeds) stays within {100 * WITHIN:.0f} point of the "
        "best along that axis, with the other settings of the best point that has at least three values on it "
        "(around a centre: the centre); between two values, accuracy is interpolated linearly in the logarithm. "
        "≥: the region reaches the end of the values that were tried."
    )
    header = ("hyperparameter", "of", "decades", "each seed alone", "from", "to", "settings", "at 0: top-1, %")
    table = Table(header=header, rows=[_robustness_row(line) for line in lines], num_words=2)
    return picture("Robustness to the hyperparameters", "robustness", draw_slopes(lines), text, table)


def _robustness_row(slope: Slope) -> tuple[str, ...]:
    region = slope.region
    at_least = "≥ " if region.open_low or region.open_high else ""
    return (
        slope.axis,
        slope.group or "all",
        f"{at_least}{region.decades:.2f}",
        plus_minus(spread(slope.decades_of_seeds), 1.0, 2),
        ("≤ " if region.open_low else "") + show(float(f"{region.low:.2g}")),
        ("≥ " if region.open_high else "") + show(float(f"{region.high:.2g}")),
        str(len(slope.points)),
        plus_minus(slope.zero.top1) if slope.zero else "-",
    )


def _published(results: SweepResults) -> list[Block]:
    network = next((name for name in networks() if results.base.startswith(name + "_")), "")
    best = results.ranked[0]
    root, num_classes = data_of_sweep(results)
    row = (f"{best.name} (best of this sweep)", plus_minus(best.top1), plus_minus(best.end("top5")))
    return published_blocks(network, num_classes, root, row)


def data_of_sweep(results: SweepResults) -> tuple[str, int]:
    """Return root and number of classes of the data, by sweep.json or else the name of the base."""
    config = results.facts.get("config") or {}
    words = [str(word) for word in results.facts.get("options") or ()]
    options = dict(itertools.pairwise(words)) | dict(word.split("=", 1) for word in words if "=" in word)
    root = config.get("data", {}).get("root") or options.get("--data.root") or results.base
    of_base = 10 if "cifar10" in results.base else 1000
    return str(root), int(config.get("model", {}).get("num_classes") or options.get("--model.num_classes") or of_base)


def _points(results: SweepResults) -> Block:
    header = ("point", "seeds", "top-1, %", "best top-1, %", "top-5, %", "validation loss", "training top-1, %",
              "last flip ratio", "images/s", "minutes per run")  # fmt: skip
    best = {number for number, point in enumerate(results.points) if point is results.ranked[0]}
    table = Table(header=header, rows=[_point_row(point) for point in results.points], strong=frozenset(best))
    return Block(heading="All points", table=table)


def _point_row(point: SweepPoint) -> tuple[str, ...]:
    num_runs = len(point.finished) + len(point.others)
    flips, seconds = point.end("flip_ratio"), point.end("seconds")
    return (
        point.name,
        f"{len(point.finished)} of {num_runs}" if point.others else str(num_runs),
        *(plus_minus(point.end(key)) for key in ("top1", "best.top1", "top5")),
        plus_minus(point.end("loss"), 1.0, 3),
        plus_minus(point.end("train_top1")),
        "-" if flips is None else show(float(f"{flips.mean:.1e}")),
        _mean(point.end("images_per_second"), "{:,.0f}"),
        _mean(seconds and Spread(seconds.mean / 60, seconds.sd, seconds.num), "{:.1f}"),
    )


def _mean(value: Spread | None, form: str) -> str:
    return "-" if value is None else form.format(value.mean)


def _unfinished(results: SweepResults) -> list[Block]:
    rows = []
    for run in (run for point in results.points for run in point.others):
        reason = run.error or ("" if run.status == "pending" else "no accuracy in its row")
        rows.append((run.name, run.seed, run.status, reason))
    table = Table(header=("run", "seed", "status", "reason"), rows=rows, num_words=4)
    return [Block(heading="Runs without a result", table=table)] if rows else []


def _facts(results: SweepResults) -> Block:
    rows = [("sweep", results.name), ("base configuration", results.base), ("read from", str(results.path))]
    rows += [(name, _text(value)) for name, value in results.facts.items() if name != "config"]  # which is long
    table = Table(header=("", ""), rows=[(name, value) for name, value in rows if value], num_words=2)
    return Block(heading="Where this comes from", table=table)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
