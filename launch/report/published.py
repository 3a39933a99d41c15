"""Accuracies that others published, and where."""

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("published.json")
EMBEDDED = ("fashion-mnist", "fashion-mnist-full")


class Published(NamedTuple):
    """A published accuracy in percent; top5 is None where none was given."""

    method: str
    top1: float
    top5: float | None
    source: str
    same_network: bool
    """False: a neighbour, in network or recipe."""


def networks() -> tuple[str, ...]:
    """Networks with published accuracies."""
    return tuple(_content())


def data_of(network: str) -> str:
    """The data set of the accuracies of `network`."""
    return str(_content()[network]["data"])


def published(network: str) -> list[Published]:
    """The accuracies of `network` and its neighbours; empty for a network that nobody published."""
    rows = _content().get(network, {"rows": []})["rows"]
    return [Published(row["method"], row["top1"], row.get("top5"), row["source"], row["same_network"]) for row in rows]


def is_comparable(network: str, num_classes: int, root: str) -> bool:
    """Whether a run of `network` on `root` may be on the data of the published accuracies."""
    return network in networks() and num_classes == _content()[network]["num_classes"] and root not in EMBEDDED


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content
