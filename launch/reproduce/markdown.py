"""The card of a run of the paper as Markdown."""

from collections.abc import Sequence

from bitfleet.launch.reproduce.card import Card
from bitfleet.launch.reproduce.standing import Standing

MOST_ROWS = 25
"""Of the table of validations; reproduce.json has them all."""


def as_markdown(card: Card) -> str:
    """The whole card, for a reader who has seen nothing else of the run."""
    paper = card.paper
    title = f"{paper.title}: a dry run" if paper.is_dry else paper.title
    parts = [
        f"# {title}",
        f"**{card.verdict.kind}**: {card.verdict.sentence}.",
        _numbers(card),
        "## Settings that are not the paper's" if not paper.is_dry else "## Settings that are not those of the dry run",
        "\n".join(f"- {change}" for change in card.changes) or "None.",
        "## How any run of bitfleet differs from the paper's",
        "\n".join(f"- {each}" for each in paper.differences),
        "## Against the expected curve",
        _curve(card),
        "## The run",
        _run(card),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _published(value: float | None) -> str:
    return "not published" if value is None else f"{value:g} %"  # with the digits that were published


def _numbers(card: Card) -> str:
    paper, validations = card.paper, card.record.validations
    last = validations[-1] if validations else None
    top1, top5 = (last.top1, last.top5) if last else (None, None)

    def difference(here: float | None, published: float | None) -> str:
        return "-" if here is None or published is None or paper.is_dry else f"{here - published:+.2f}"

    epochs = card.record.steps_per_epoch
    rows = [
        [
            f"**this run**, epoch {last.step / epochs:g} of {card.record.config.epochs}" if last else "**this run**",
            _percent(top1),
            _percent(top5),
            "",
        ],
        [
            "the paper",
            _published(paper.top1),
            _published(paper.top5),
            difference(top1, paper.top1),
        ],
    ]
    rows += [
        [each.name, _published(each.top1), _published(each.top5), difference(top1, each.top1)]
        for each in paper.neighbours
    ]
    text = _table(["", "top-1", "top-5", "this run above it, points of top-1"], rows)
    if paper.is_dry:
        return f"{text}\n\nThe published numbers are of {paper.title}: nothing here can be compared with them."
    if validations:
        best = max(validations, key=lambda each: each.top1)
        text += f"\n\nBest top-1: {best.top1:.2f} % after epoch {best.step / epochs:g}; the last one counts."
    return f"{text} Tolerance: {paper.tolerance:g} points (docs/reproduce.md says why)."


def _curve(card: Card) -> str:
    curve = card.curve
    if curve is None:
        return "No validation curve is known for this run, only its end."
    shown = _thinned(card.standings)
    rows = [
        [
            f"{each.epochs_done:g}",
            f"{each.top1:.2f}",
            "-" if each.expected is None else f"{each.expected:.2f} +- {each.tolerance:.1f}",
            "-" if each.difference is None else f"{each.difference:+.2f}",
            each.word,
        ]
        for each in shown
    ]
    about = f"{curve.name} ({curve.epochs} epochs; {curve.recipe}). {curve.comparable} Source: {curve.source}."
    return f"{about}\n\n{_table(['epoch', 'top-1, %', 'expected', 'difference', ''], rows)}"


def _thinned(standings: Sequence[Standing]) -> list[Standing]:
    """At most `MOST_ROWS`, evenly spread, the last one among them."""
    every = -(-len(standings) // MOST_ROWS) or 1
    return list(standings[::-1][::every][::-1])


def _run(card: Card) -> str:
    record = card.record
    facts, config, size = record.facts, record.config, record.size
    machine = facts.get("hardware")
    gpus = machine["gpus"] if machine else []
    described = (
        f"{', '.join(f'{gpus.count(name)} x {name}' for name in dict.fromkeys(gpus)) or 'no GPU'}; {machine['processor']}, "
        f"{machine['num_cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB"
        if machine
        else "not recorded"
    )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    macs = f"{size.num_macs_1bit:,} 1-bit and {size.num_macs_32bit:,} 32-bit multiply-accumulates an image"
    rows = [
        ["configuration", f"{config.name}: config.json in the folder of the run"],
        ["data", f"{config.data.root}, sha256 of its lists {record.data_sha}"],
        ["steps", f"{record.step:,} of {record.num_steps:,}, {record.num_skipped_steps:,} of them skipped"],
        ["seed", str(config.seed)],
        [
            "ranks",
            f"{facts['world_size']} ({facts['device'].split(':')[0]}), {facts['num_replicas']} replica(s): BatchNorm sees "
            f"{config.global_batch_size // facts['num_replicas']} images",
        ],
        ["machine of rank 0", described],
        ["hours of training", f"{record.hours:.2f}"],
        [
            "network",
            f"{size.num_parameters:,} parameters, {size.num_binary_parameters:,} of them 1-bit; {record.num_bytes:,} bytes; "
            f"{macs}",
        ],
        ["weights", f"step {record.checkpoint_step:,}, sha256 {record.weights_sha}"],
        ["git", str(facts["git"])],
        ["versions", versions],
    ]
    return _table(["", ""], rows)
