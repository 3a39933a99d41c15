"""The report as one HTML page that needs nothing else, and its pictures as PNG files beside it."""

import base64
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bitfleet.trainer.run.files import write_atomically

TEMPLATE = "page.html"
PAGE = "report.html"
PICTURES = "report"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text; columns of numbers stand at the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_words: int = 1
    """The first so many columns are words."""
    strong: frozenset[int] = frozenset()
    """Rows to stand out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of a section: a heading, what it says, a picture, a table."""

    heading: str
    text: str = ""
    picture: str = ""
    """Name of the PNG file, without ending; "" for none."""
    png: bytes = b""
    table: Table | None = None

    @property
    def data(self) -> str:
        """The picture as base64."""
        return base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A sweep or a run."""

    key: str
    """Unique in the page; names its pictures."""
    title: str
    question: str = ""
    answer: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()


def write_page(title: str, sections: Sequence[Section], output: Path) -> Path:
    """Write <output>/report.html and its pictures <output>/report/<section>-<picture>.png; returns the page.

    Raises:
        ValueError: the folder cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(TEMPLATE).render(title=title, sections=sections)
    page = output / PAGE
    try:
        (output / PICTURES).mkdir(parents=True, exist_ok=True)
        for section in sections:
            for block in section.blocks:
                if block.png:
                    (output / PICTURES / f"{section.key}-{block.picture}.png").write_bytes(block.png)
        write_atomically(page, html)
    except OSError as error:
        raise ValueError(f"cannot write the report into {output}: {error}; choose another --output") from error
    return page
