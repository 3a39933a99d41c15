"""A run's part of the page."""

from bitfleet.launch.report.page import Block, Section, Table
from bitfleet.launch.report.published_table import published_block
from bitfleet.launch.report.run_plots import (
    draw_diagnostics,
    draw_flips,
    draw_learning,
    draw_ratios,
    draw_schedules,
    draw_speed,
)
from bitfleet.launch.report.run_results import DIAGNOSTICS, RunResults, answer, summary


def run_section(run: RunResults, key: str) -> Section:
    """Everything about a run."""
    drawn = [
        ("Learning", "", "learning", draw_learning(run)),
        ("Flips", "", "flips", draw_flips(run)),
        ("Diagnostics of the bits", "Parts of the binary weights: all in black, layers from the first (dark) to the last "
         "(light).", "diagnostics", draw_diagnostics(run)),
        ("What is compared with the threshold", "How large |r| is over the binary weights. Those right of the threshold flip if "
         "the sign agrees; those left of it lie in the dead band.", "ratios", draw_ratios(run)),
        ("Schedules", "", "schedules", draw_schedules(run)),
        ("Speed", "", "speed", draw_speed(run)),
    ]  # fmt: skip
    blocks = [
        Block(heading=heading, text=text, picture=picture, png=png)
        for heading, text, picture, png in drawn
        if png is not None
    ]
    config = Block(heading="Configuration", table=Table(header=("", ""), rows=tuple(summary(run)), num_words=2))
    return Section(
        key=key,
        title=run.name,
        answer=tuple(answer(run)),
        blocks=(*blocks, *_layers(run), *_published(run), config),
    )


def _layers(run: RunResults) -> list[Block]:
    """The last diagnostics of each layer."""
    last = run.last("diagnostics")
    keys = [key for key in ("flip_ratio", *DIAGNOSTICS) if key in last]
    names = [name.removeprefix("flip_ratio/") for name in last if name.startswith("flip_ratio/")]
    if not keys or not names:
        return []
    rows = [
        (name or "all", *(_percent(last.get(f"{key}/{name}" if name else key)) for key in keys))
        for name in ("", *names)
    ]
    return [
        Block(
            heading=f"Bits of each layer after step {last['step']:,}, %",
            table=Table(
                header=("layer", *(key.replace("_", " ") for key in keys)), rows=tuple(rows), strong=frozenset({0})
            ),
        )
    ]


def _percent(value: object) -> str:
    return f"{100 * value:.3g}" if isinstance(value, (int, float)) else "-"


def _published(run: RunResults) -> list[Block]:
    model, data, last = run.config.get("model", {}), run.config.get("data", {}), run.last("validation")
    block = published_block(
        str(model.get("name")),
        int(model.get("num_classes", 0)),
        str(data.get("root")),
        f"{run.name}, after step {last['step']:,}" if last else run.name,
        _percent(last.get("top1")),
        _percent(last.get("top5")),
    )
    return [block] if block else []
