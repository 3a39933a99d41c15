"""Names of classes and files as text that shows what is in them, and names that look alike."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence

_MOST_SHOWN = 3


def shown(name: str) -> str:
    """A name for a message: as it is, or escaped where a reader could not see all of it.

    Escaped are combining characters ("e\\u0301" looks like "\\xe9"), invisible ones and bytes that are not UTF-8.
    """
    plain = name.isascii() or (unicodedata.is_normalized("NFC", name) and not any(map(unicodedata.combining, name)))
    return name if plain and name.isprintable() else ascii(name)[1:-1]


def quoted(name: str, others: Iterable[str] = ()) -> str:
    """`shown` in quotation marks; escaped also where one of `others` looks the same."""
    twins = {other for other in others if other != name and look(other) == look(name)}
    return ascii(name) if twins else f"'{shown(name)}'"


def look(name: str) -> str:
    """What two names have in common that look the same to a reader."""
    return unicodedata.normalize("NFC", name)


def look_alikes(classes: Sequence[str]) -> list[str]:
    """A sentence for each kind of classes that differ in nothing that a reader, or another file system, would see."""
    said = []
    twins = _pairs(classes, look)
    if twins:
        said.append(f"classes whose names look the same: {_named(twins)}")
    cases = [pair for pair in _pairs(classes, lambda name: look(name).casefold()) if look(pair[0]) != look(pair[1])]
    if cases:
        said.append(f"classes whose names differ in upper and lower case alone: {_named(cases)}")
    return said


def _pairs(classes: Sequence[str], key: Callable[[str], str]) -> list[tuple[str, str]]:
    first: dict[str, str] = {}
    return [(earlier, name) for name in classes if (earlier := first.setdefault(key(name), name)) != name]


def _named(pairs: Sequence[tuple[str, str]]) -> str:
    named = ", ".join(f"{one!a} and {other!a}" for one, other in pairs[:_MOST_SHOWN])
    return named + (f" and {len(pairs) - _MOST_SHOWN} more" if len(pairs) > _MOST_SHOWN else "")
