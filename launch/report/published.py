"""Compare a result with the published accuracies of its network (published.json)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from bitfleet.launch.report.page import Block, Table

FILE = Path(__file__).with_name("published.json")
EMBEDDED = ("fashion-mnist", "fashion-mnist-full")


class Published(NamedTuple):
    """A published accuracy in percent; top5 is None if it was not published."""

    method: str
    top1: float
    top5: float | None
    source: str
    same_network: bool
    """False for a neighbour: another network or recipe."""


def networks() -> tuple[str, ...]:
    """Return the networks with published accuracies."""
    return tuple(_content())


def data_of(network: str) -> str:
    """Return the data set of the published accuracies of `network`."""
    return str(_content()[network]["data"])


def published(network: str) -> list[Published]:
    """Return the accuracies of `network` and its neighbours; nothing for an unknown network."""
    rows = _content().get(network, {"rows": []})["rows"]
    return [Published(row["method"], row["top1"], row.get("top5"), row["source"], row["same_network"]) for row in rows]


def is_comparable(network: str, num_classes: int, root: str) -> bool:
    """Return True if a run of `network` on `root` may be on the data of the published
    accuracies."""
    return network in networks() and num_classes == _content()[network]["num_classes"] and root not in EMBEDDED


def published_blocks(network: str, num_classes: int, root: str, row: tuple[str, str, str]) -> list[Block]:
    """Return the table of the published accuracies of `network`, if there are any.

    Args:
        network: its name.
        num_classes: classes of the data of the result.
        root: data of the result.
        row: name, top-1 and top-5 (percent) of the result, for the first row.
    """
    name, *accuracies = row
    rows = [(name, "this report", *accuracies)]
    known = published(network)
    for near in sorted(known, key=lambda near: (not near.same_network, -near.top1)):
        method = near.method if near.same_network else f"neighbour: {near.method}"
        rows.append((method, near.source, f"{near.top1:g}", "-" if near.top5 is None else f"{near.top5:g}"))
    if not known:
        return []
    text = f"{network} on {data_of(network)}; one run each, no spread was published."
    if not is_comparable(network, num_classes, root):
        text += (
            f" The first row is on other data ({root}, {num_classes} classes) and must not be compared with the others."
        )
    header = ("method", "source", "top-1, %", "top-5, %")
    table = Table(header=header, rows=rows, num_words=2, strong=frozenset({0}))
    return [Block(heading=f"Among the published accuracies of {network}", text=text, table=table)]


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content
