"""Write the part of the page about a run."""

from bitfleet.launch.report import run_plots
from bitfleet.launch.report.page import Block, Section, Table, picture
from bitfleet.launch.report.published import published_blocks
from bitfleet.launch.report.run_journal import journal_blocks
from bitfleet.launch.report.run_results import DIAGNOSTICS, RunResults, answer, summary


def run_section(run: RunResults, key: str) -> Section:
    """Return everything about a run."""
    bits = "Fractions of the binary weights: all in black, layers from the first (dark) to the last (light)."
    ratios = (
        "Distribution of |r| over the binary weights. Those right of the threshold flip if the sign agrees; those left of it "
        "are in the dead band."
    )
    blocks = [
        *picture("Learning", "learning", run_plots.draw_learning(run)),
        *picture(
            "Flips", "flips", run_plots.draw_flips(run.curve("train", "flip_ratio"), run.layers("train", "flip_ratio"))
        ),
        *journal_blocks(run),
        *picture("Diagnostics of the bits", "diagnostics", run_plots.draw_diagnostics(run), bits),
        *picture("The ratio that is compared with the threshold", "ratios", run_plots.draw_ratios(run), ratios),
        *picture("Schedules", "schedules", run_plots.draw_schedules(run)),
        *picture("Speed", "speed", run_plots.draw_speed(run)),
        *_layers(run),
        *_published(run),
        Block(heading="Configuration", table=Table(header=("", ""), rows=tuple(summary(run)), num_words=2)),
    ]
    return Section(key=key, title=run.name, answer=tuple(answer(run)), blocks=tuple(blocks))


def _layers(run: RunResults) -> list[Block]:
    """Return the table of the last diagnostics of each layer."""
    last = run.last("diagnostics")
    keys = [key for key in ("flip_ratio", *DIAGNOSTICS) if key in last]
    names = [name.removeprefix("flip_ratio") for name in last if name.startswith("flip_ratio/")]
    if not keys or not names:
        return []
    rows = [(name[1:] or "all", *(_percent(last.get(key + name)) for key in keys)) for name in ("", *names)]
    header = ("layer", *(key.replace("_", " ") for key in keys))
    table = Table(header=header, rows=tuple(rows), strong=frozenset({0}))
    return [Block(heading=f"Bits of each layer after step {last['step']:,}, %", table=table)]


def _percent(value: object) -> str:
    return f"{100 * value:.3g}" if isinstance(value, (int, float)) else "-"


def _published(run: RunResults) -> list[Block]:
    model, data, last = run.config.get("model", {}), run.config.get("data", {}), run.last("validation")
    name = f"{run.name}, after step {last['step']:,}" if last else run.name
    row = (name, _percent(last.get("top1")), _percent(last.get("top5")))
    return published_blocks(str(model.get("name")), int(model.get("num_classes", 0)), str(data.get("root")), row)
