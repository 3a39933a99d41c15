"""What a scan of a data set finds and does not list, counted by reason: said always, an error where it is more than a trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitfleet.trainer.data.class_names import shown

LIMIT = 0.01
"""More than this share of the images of a split is an error unless it is allowed."""

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
"""Reasons that are said and do not count: no image is lost by them."""
_MOST_SUFFIXES = 10  # counted one by one; numbered files like photo.0001 would each have a suffix of its own


@dataclass(slots=True)
class LeftOut:
    """Counts of one split by reason, and the first example of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str, number: int = 1) -> None:
        """Count `number` more."""
        if number:
            self.counts[reason] = self.counts.get(reason, 0) + number
            self.examples.setdefault(reason, example)

    def add_suffix(self, suffix: str, example: str) -> None:
        """Count a file that is not an image that is read, by its suffix."""
        reason = (
            f"files named *{shown(suffix)}, not images that are read"
            if suffix
            else "files without a suffix, not images"
        )
        num_suffixes = sum(known.startswith("files named *") for known in self.counts)
        if reason not in self.counts and suffix and num_suffixes >= _MOST_SUFFIXES:
            reason = _OTHER_SUFFIXES
        self.add(reason, example)

    def update(self, other: "LeftOut") -> None:
        """Count what `other` has counted, too."""
        for reason, number in other.counts.items():
            self.add(reason, other.examples[reason], number)

    def fault(self, num_images: int) -> str:
        """Say what is left out, with examples, if it is too much beside `num_images` that are listed; else ""."""
        lost = {reason: number for reason, number in self.counts.items() if reason not in _HARMLESS}
        if sum(lost.values()) <= LIMIT * num_images:
            return ""
        named = (f"{number:,} {reason}, the first: {shown(self.examples[reason])}" for reason, number in lost.items())
        return f"more than {LIMIT:.0%} beside the {num_images:,} images that are listed: {'; '.join(named)}"


def in_words(counts: Mapping[str, Mapping[str, int]]) -> str:
    """What is left out of each split, e.g. "train: 3 links to nothing"; "" for nothing."""
    parts = []
    for split, of_split in counts.items():
        most_first = sorted(of_split.items(), key=lambda counted: (-counted[1], counted[0]))
        if most_first:
            parts.append(f"{split}: {', '.join(f'{number:,} {reason}' for reason, number in most_first)}")
    return "; ".join(parts)
