"""Tables and numbers in plain text, as every command prints them."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str = "<") -> str:
    """Return `rows` as lines whose columns stand two spaces apart.

    Args:
        rows: cells; the first row may be the heads.
        align: "<" or ">" per column; columns after its end are right-aligned.
    """
    columns = max(map(len, rows), default=0)
    widths = [max((len(row[column]) for row in rows if column < len(row)), default=0) for column in range(columns)]
    sides = align.ljust(columns, ">")
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False)).rstrip()
        for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return `rows`, the first of them the heads, as a table of Markdown."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def megabytes(num_bytes: float) -> str:
    """Bytes in megabytes of 1e6: "0.02 MB", "48.9 MB", "1,203 MB"."""
    value = num_bytes / 1e6
    return f"{value:,.0f} MB" if value >= 1000 else f"{value:.1f} MB" if value >= 1 else f"{value:.2g} MB"


def gigabytes(num_bytes: float) -> str:
    """Bytes in gigabytes of 1e9: "12.3 GB"."""
    return f"{num_bytes / 1e9:,.1f} GB"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction in percent: "57.20 %"; "-" for None."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


def rough_percent(fraction: float) -> str:
    """A fraction in percent with two digits, as a power of ten if it is tiny: "25 %", "0.26 %",
    "8e-08 %"."""
    if fraction == 0.0:
        return "0 %"
    if fraction >= 0.1:
        return f"{100 * fraction:.0f} %"
    return f"{100 * fraction:.2g} %" if fraction >= 1e-5 else f"{100 * fraction:.0e} %"
