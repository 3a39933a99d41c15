"""The samples of a WebDataset shard: which image and which label belong together."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bitfleet.launch.data.tar_members import Member
from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.image_kinds import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    is_folder_of_system,
    is_image,
    is_of_system,
)
from bitfleet.trainer.data.left_out import LeftOut

# As in the webdataset library: the folders and the name up to its first dot, and what follows.
_KEY = re.compile(r"((?:.*/|)[^./][^.]*)[.]([^/]*)", re.DOTALL)
_LABELS = ("cls", "json")  # what is asked first comes first


class Sample(NamedTuple):
    """An image and its label."""

    image: Member
    label: Member | None
    expected: str
    """The label's name, where there is none."""


def samples(members: Sequence[Member], what: str, omitted: LeftOut, head: Callable[[Member], bytes]) -> list[Sample]:
    """Pair the images of a shard with their labels, in the order of the images.

    KEY.jpg belongs to KEY.cls or KEY.json, whatever dots are in KEY; KEY.image.jpg to KEY.cls if it is the only image of KEY.

    Args:
        members: of the shard.
        what: the shard, for examples.
        omitted: what belongs to no sample is counted in it.
        head: the first bytes of a member; asked where its suffix says nothing.
    """
    place = {id(member): index for index, member in enumerate(members)}
    found: list[Sample] = []
    for key, fields in _by_key(members, what, omitted).items():
        found += _of_key(key, fields, what, omitted, head)
    return sorted(found, key=lambda sample: place[id(sample.image)])


def _by_key(members: Sequence[Member], what: str, omitted: LeftOut) -> dict[str, dict[str, Member]]:
    """Key -> extension in lower case -> member."""
    keys: dict[str, dict[str, Member]] = {}
    for member in members:
        *folders, name = member.name.split("/")
        example = f"{member.name} in {what}"
        matched = _KEY.fullmatch(member.name)
        if is_of_system(name) or any(map(is_folder_of_system, folders)):
            omitted.add(left_out.SYSTEM, example)
        elif name.startswith("."):
            omitted.add(left_out.HIDDEN, example)
        elif name.startswith("__") and name.endswith("__"):  # the library's own notes
            omitted.add(left_out.TEXT, example)
        elif not matched:
            omitted.add(left_out.NO_SUFFIX, example)
        elif (extension := matched[2].lower()) in (fields := keys.setdefault(matched[1], {})):
            omitted.add(left_out.DOUBLE, f"{matched[1]}.*: {fields[extension].name} and {member.name} in {what}")
        else:
            fields[extension] = member
    return keys


def _of_key(
    key: str, fields: Mapping[str, Member], what: str, omitted: LeftOut, head: Callable[[Member], bytes]
) -> list[Sample]:
    images = [extension for extension in fields if _suffix(extension) in IMAGE_SUFFIXES]
    if not images:
        unsure = (each for each in fields if _suffix(each) not in TEXT_SUFFIXES)
        images = [extension for extension in unsure if is_image(head(fields[extension])[:HEAD_BYTES])]
    if not images:
        _count_without_image(key, fields, what, omitted)
        return []
    found, used = [], set()
    plain = [extension for extension in images if "." not in extension]
    own = [extension for extension in images if extension not in plain and _label(fields, _stem(extension))]
    others = [extension for extension in images if extension not in (*plain, *own)]
    chosen = plain[:1] + own or others[:1]
    for extension in chosen:
        label = _label(fields, _stem(extension)) or _label(fields, "")
        used.add(label)
        expected = f"{key}.cls, or {key}.json with a number named label or cls"
        found.append(Sample(fields[extension], fields[label] if label else None, expected))
    doubles = plain[1:] if plain else [] if own else others[1:]
    for extension in images:
        if extension in doubles:
            omitted.add(left_out.DOUBLE, f"{key}.*: {fields[chosen[0]].name} and {fields[extension].name} in {what}")
        elif extension not in chosen:
            omitted.add(left_out.SIDE_IMAGE, f"{fields[extension].name} in {what}")
    for extension in fields:
        if not plain and _suffix(extension) == ".cls" and extension not in used:
            omitted.add(left_out.NO_IMAGE, f"{fields[extension].name} in {what}")
    return found


def _count_without_image(key: str, fields: Mapping[str, Member], what: str, omitted: LeftOut) -> None:
    labels = [extension for extension in fields if extension.rpartition(".")[2] in _LABELS]
    for extension in labels or list(fields)[:1]:
        example = f"{fields[extension].name} in {what}"
        if labels:
            omitted.add(left_out.NO_IMAGE, example)
        else:
            omitted.add_suffix(_suffix(extension), example)


def _label(fields: Mapping[str, Member], stem: str) -> str | None:
    """The extension of the label of the image whose extension is `stem`.jpg."""
    wanted = (f"{stem}.{kind}" if stem else kind for kind in _LABELS)
    return next((extension for extension in wanted if extension in fields), None)


def _suffix(extension: str) -> str:
    return "." + extension.rpartition(".")[2]


def _stem(extension: str) -> str:
    return extension.rpartition(".")[0]
