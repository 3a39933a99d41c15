"""A sweep's part of the page."""

import itertools
import math
from collections.abc import Sequence

from bitfleet.launch.report.page import Block, Section, Table
from bitfleet.launch.report.published import networks
from bitfleet.launch.report.published_table import published_block
from bitfleet.launch.report.statistics import WITHIN, Spread, spread
from bitfleet.launch.report.sweep_curves import MAX_PANELS, draw_curves, facets
from bitfleet.launch.report.sweep_findings import Slope, answer, fastest, grids, levels, plus_minus, slopes, speeds
from bitfleet.launch.report.sweep_plots import MAX_ROWS, draw_dots, draw_grids, draw_slopes, draw_speeds
from bitfleet.launch.report.sweep_results import SweepResults, show


def sweep_section(results: SweepResults, key: str) -> Section:
    """Everything about a sweep."""
    blocks = [
        Block(
            heading="Accuracy at the end, all seeds",
            text=f"The best {MAX_ROWS} of {len(results.points)} points." if len(results.points) > MAX_ROWS else "",
            picture="top1",
            png=draw_dots(results),
        ),
        *_grids(results),
        *_curves(results),
        *_convergence(results),
        *_robustness(results),
        *_published(results),
        _points(results),
        *_unfinished(results),
        *_facts(results),
    ]
    return Section(
        key=key, title=results.title, question=results.question, answer=tuple(answer(results)), blocks=tuple(blocks)
    )


def _curves(results: SweepResults) -> list[Block]:
    num_lines = sum(len(facet.points) for facet in facets(results))
    text = "Lines are means over the seeds, bands ± one standard deviation."
    if num_lines == MAX_PANELS < len(results.ranked):
        text += f" The best {MAX_PANELS} points are drawn."
    drawn = [
        ("Validation accuracy over the steps", "curves", draw_curves(results, "top1", "top-1", is_fraction=True)),
        ("Flip ratio over the steps", "flips", draw_curves(results, "flip_ratio", "flip ratio", is_fraction=False)),
    ]
    return [
        Block(heading=heading, text=text, picture=picture, png=png)
        for heading, picture, png in drawn
        if png is not None
    ]


def _convergence(results: SweepResults) -> list[Block]:
    found = levels(results)
    png = draw_speeds(results, found)
    if png is None:
        return []
    rows = []
    for point in results.points:
        if point.finished:
            cells = [
                plus_minus(speed.steps, 1.0, 0)
                + (f" ({len(speed.reached)} of {speed.num})" if len(speed.reached) < speed.num else "")
                for speed in speeds(point, found)
            ]
            rows.append((point.name, *cells))
    header = ("point", *(f"steps to {100 * level:.0f} %" for level in found))
    return [
        Block(
            heading="Convergence: steps to an accuracy",
            text=f"{fastest(results)} The accuracies are near 80, 90 and 95 % of what the best point ends at; steps are counted "
            "to the first validation that reaches them. (1 of 3): so many seeds reach it, and the mean is over these.",
            picture="convergence",
            png=png,
            table=Table(header=header, rows=tuple(rows)),
        )
    ]


def _grids(results: SweepResults) -> list[Block]:
    found = grids(results)
    blocks = []
    for key, heading, picture in (("top1", "top-1, %", "heatmap"), ("flip_ratio", "last flip ratio", "heatmap-flips")):
        if found and (png := draw_grids(found, key, heading)) is not None:
            blocks.append(Block(heading=f"Two axes: {heading}", picture=picture, png=png))
    return blocks


def _robustness(results: SweepResults) -> list[Block]:
    found = slopes(results)
    if not found:
        return []
    rows = tuple(_robustness_row(slope) for slope in found)
    return [
        Block(
            heading="Robustness to the hyperparameters",
            text=f"Width of the region in which top-1 (mean over the seeds) stays within {100 * WITHIN:.0f} point of the best "
            "along that axis, all else as at the best point through which three or more settings go (around a centre: "
            "the centre); between two settings accuracy is taken as linear in the logarithm. "
            "≥: the region reaches the end of what was tried.",
            picture="robustness",
            png=draw_slopes(found),
            table=Table(
                header=(
                    "hyperparameter",
                    "of",
                    "decades",
                    "each seed alone",
                    "from",
                    "to",
                    "settings",
                    "at 0: top-1, %",
                ),
                rows=rows,
                num_words=2,
            ),
        )
    ]


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
    block = published_block(
        network, num_classes, root, f"{best.name} (best of this sweep)", plus_minus(best.top1),
        plus_minus(best.end("top5")),
    )  # fmt: skip
    return [block] if block else []


def data_of_sweep(results: SweepResults) -> tuple[str, int]:
    """Root and classes of the data of the sweep's runs, as sweep.json tells them; else what its base is named after."""
    config = results.facts.get("config") or {}
    words = [str(word) for word in results.facts.get("options") or ()]
    options = dict(itertools.pairwise(words)) | dict(word.split("=", 1) for word in words if "=" in word)
    root = config.get("data", {}).get("root") or options.get("--data.root") or results.base
    of_base = 10 if "cifar10" in results.base else 1000
    return str(root), int(config.get("model", {}).get("num_classes") or options.get("--model.num_classes") or of_base)


def _points(results: SweepResults) -> Block:
    header = ("point", "seeds", "top-1, %", "best top-1, %", "top-5, %", "validation loss", "training top-1, %",
              "last flip ratio", "images/s", "minutes a run")  # fmt: skip
    rows = []
    for point in results.points:
        whole = len(point.finished) + len(point.others)
        flips = point.end("flip_ratio")
        rows.append(
            (
                point.name,
                f"{len(point.finished)} of {whole}" if point.others else str(whole),
                plus_minus(point.top1),
                plus_minus(spread([run.best_top1 for run in point.finished])),
                plus_minus(point.end("top5")),
                plus_minus(point.end("loss"), 1.0, 3),
                plus_minus(point.end("train_top1")),
                "-" if flips is None else show(float(f"{flips.mean:.1e}")),
                _mean(point.end("images_per_second"), "{:,.0f}"),
                _mean(spread([run.seconds / 60 for run in point.finished]), "{:.1f}"),
            )
        )
    best = {number for number, point in enumerate(results.points) if point is results.ranked[0]}
    return Block(heading="All points", table=Table(header=header, rows=tuple(rows), strong=frozenset(best)))


def _mean(value: Spread | None, form: str) -> str:
    return "-" if value is None or math.isnan(value.mean) else form.format(value.mean)


def _unfinished(results: SweepResults) -> list[Block]:
    if not results.unfinished:
        return []
    rows = tuple(
        (run.name, run.seed, run.status, run.error or ("" if run.status == "pending" else "no accuracy in its row"))
        for run in results.unfinished
    )
    return [
        Block(
            heading="Runs without a result",
            table=Table(header=("run", "seed", "status", "why"), rows=rows, num_words=4),
        )
    ]


def _facts(results: SweepResults) -> list[Block]:
    rows: Sequence[tuple[str, str]] = [
        ("sweep", results.name),
        ("base configuration", results.base),
        ("read from", str(results.path)),
        *((str(name), _text(value)) for name, value in results.facts.items() if name != "config"),  # too long here
    ]
    filled = tuple((name, value) for name, value in rows if value)
    return [Block(heading="Where this comes from", table=Table(header=("", ""), rows=filled, num_words=2))]


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
