"""Count what a scan of a data set does not list, and make names readable."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

LIMIT = 0.01
"""Leaving out more than this share of the images of a split is an error unless allowed."""

HIDDEN = "hidden (the name of the file or of its folder begins with a dot)"
OUTSIDE = "outside a class folder"
IRREGULAR = "not regular files (pipes, sockets, devices)"
DANGLING = "links to nothing"
LOOP = "links to a folder above themselves"
NO_LABEL = "images without a label"
NO_CLASS = "images with a label that no class has"
NO_IMAGE = "labels without an image"
DOUBLE = "second images of one sample"
NO_SUFFIX = "members without a suffix, which belong to no sample"
EMPTY_SHARD = "shards without an image"
SPARSE = "sparse members, which cannot be read by their offset"
SIDE_IMAGE = "other images of samples that are listed"
TEXT = "text or annotations"
SYSTEM = "files of a system (.DS_Store, ._*, Thumbs.db, .gitignore, __MACOSX, ...)"
BESIDE = "other files or folders"
_OTHER_SUFFIXES = "files with other suffixes, not images that are read"

_HARMLESS = frozenset({SIDE_IMAGE, TEXT, SYSTEM})
"""Reasons that are reported but do not count towards LIMIT: no image is lost."""
_MOST_SUFFIXES = 10  # counted one by one; each of numbered files like photo.0001 has another suffix
_MOST_PAIRS = 3


@dataclass(slots=True)
class LeftOut:
    """Counts of one split by reason, and the first example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count `count` more."""
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples.setdefault(reason, example)

    def add_suffix(self, suffix: str, example: str) -> None:
        """Count a file of a format that is not read, by its suffix."""
        if not suffix:
            self.add("files without a suffix, not images", example)
            return
        reason = f"files named *{shown(suffix)}, not images that are read"
        num_suffixes = sum(known.startswith("files named *") for known in self.counts)
        is_new = reason not in self.counts
        self.add(_OTHER_SUFFIXES if is_new and num_suffixes >= _MOST_SUFFIXES else reason, example)

    def update(self, other: "LeftOut") -> None:
        """Add the counts of `other`."""
        for reason, count in other.counts.items():
            self.add(reason, other.examples[reason], count)

    def fault(self, num_images: int) -> str:
        """Describe what is left out if it exceeds LIMIT of the listed images; else ""."""
        lost = {reason: count for reason, count in self.counts.items() if reason not in _HARMLESS}
        if sum(lost.values()) <= LIMIT * num_images:
            return ""
        named = (f"{count:,} {reason}, the first: {shown(self.examples[reason])}" for reason, count in lost.items())
        return f"more than {LIMIT:.0%} besides the {num_images:,} images that are listed: {'; '.join(named)}"


def in_words(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Describe the counts of each split, e.g. "train: 3 links to nothing"; "" for none."""
    parts = []
    for split, reasons in counts.items():
        most_first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        if most_first:
            parts.append(f"{split}: {', '.join(f'{count:,} {reason}' for reason, count in most_first)}")
    return "; ".join(parts)


def shown(name: str) -> str:
    """Return a name for a message: unchanged, or escaped where a reader could not see all of it.

    Combining characters ("e\\u0301" looks like "\\xe9"), invisible ones and bytes outside UTF-8 are
    escaped.
    """
    plain = name.isascii() or (unicodedata.is_normalized("NFC", name) and not any(map(unicodedata.combining, name)))
    return name if plain and name.isprintable() else ascii(name)[1:-1]


def quoted(name: str, others: Iterable[str] = ()) -> str:
    """Return `shown` in quotation marks; escaped also if one of `others` looks the same."""
    twins = {other for other in others if other != name and look(other) == look(name)}
    return ascii(name) if twins else f"'{shown(name)}'"


def look(name: str) -> str:
    """Return a key that is equal for names that look the same to a reader."""
    return unicodedata.normalize("NFC", name)


def look_alikes(classes: Sequence[str]) -> list[str]:
    """Return a sentence about each kind of class names that cannot be told apart."""
    sentences = []
    if twins := _pairs(classes, look):
        sentences.append(f"classes whose names look the same: {_named(twins)}")
    cases = [pair for pair in _pairs(classes, lambda name: look(name).casefold()) if look(pair[0]) != look(pair[1])]
    if cases:
        sentences.append(f"classes whose names differ in upper and lower case alone: {_named(cases)}")
    return sentences


def _pairs(classes: Sequence[str], key: Callable[[str], str]) -> list[tuple[str, str]]:
    first: dict[str, str] = {}
    return [(earlier, name) for name in classes if (earlier := first.setdefault(key(name), name)) != name]


def _named(pairs: Sequence[tuple[str, str]]) -> str:
    named = ", ".join(f"{one!a} and {other!a}" for one, other in pairs[:_MOST_PAIRS])
    return named + (f" and {len(pairs) - _MOST_PAIRS} more" if len(pairs) > _MOST_PAIRS else "")
