"""Write a report as one HTML page without other files, and its pictures as PNG files next to it."""

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
    """Rows of text; columns of numbers are right-aligned."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_words: int = 1
    """Number of columns, from the first, that hold words."""
    strong: frozenset[int] = frozenset()
    """Indices of the rows in bold."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of a section: a heading, a text, a picture, a table."""

    heading: str
    text: str = ""
    picture: str = ""
    """Name of the PNG file without its ending; "" without a picture."""
    png: bytes = b""
    table: Table | None = None

    @property
    def data(self) -> str:
        """Return the picture as base64."""
        return base64.b64encode(self.png).decode()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A sweep or a run."""

    key: str
    """Anchor in the page, unique; the names of its pictures begin with it."""
    title: str
    question: str = ""
    answer: Sequence[str] = ()
    blocks: Sequence[Block] = ()


def picture(heading: str, name: str, png: bytes | None, text: str = "", table: Table | None = None) -> list[Block]:
    """Return the block of a picture; nothing without one."""
    return [] if png is None else [Block(heading=heading, text=text, picture=name, png=png, table=table)]


def write_page(title: str, sections: Sequence[Section], output: Path) -> Path:
    """Write <output>/report.html and <output>/report/<section>-<picture>.png; return the path of
    the page.

    Raises:
        ValueError: the folder cannot be written.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
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
