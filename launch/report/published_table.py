"""A result among the published ones."""

from bitfleet.launch.report.page import Block, Table
from bitfleet.launch.report.published import data_of, is_comparable, published

FIRST_WORDS = ("method", "source")


def published_block(network: str, num_classes: int, root: str, name: str, top1: str, top5: str) -> Block | None:
    """The table of `network`'s published accuracies with `top1` and `top5` (percent, as text) of `name` as its first row.

    None for a network of which none were published.
    """
    found = published(network)
    if not found:
        return None
    rows = [(name, "this report", top1, top5)]
    for same in (True, False):
        for row in sorted((row for row in found if row.same_network is same), key=lambda row: -row.top1):
            method = row.method if same else f"neighbour: {row.method}"
            rows.append((method, row.source, f"{row.top1:g}", "-" if row.top5 is None else f"{row.top5:g}"))
    data = data_of(network)
    text = f"{network} on {data}; one run each, no spread was published."
    if not is_comparable(network, num_classes, root):
        text += (
            f" The first row is on other data ({root}, {num_classes} classes) and must not be compared with the others."
        )
    return Block(
        heading=f"Among the published accuracies of {network}",
        text=text,
        table=Table(
            header=(*FIRST_WORDS, "top-1, %", "top-5, %"), rows=tuple(rows), num_words=2, strong=frozenset({0})
        ),
    )
