"""The images in a folder and all folders below it, in the order of torchvision's ImageFolder."""

import os
import stat
from dataclasses import dataclass, field

from bitfleet.trainer.data import left_out
from bitfleet.trainer.data.image_kinds import (
    HEAD_BYTES,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    is_folder_of_system,
    is_image,
    is_of_system,
    suffix_of,
)
from bitfleet.trainer.data.left_out import LeftOut


@dataclass(slots=True)
class FoundImages:
    """Names, sizes and times; of a file whose suffix says that it is an image nothing is read yet."""

    names: list[str] = field(default_factory=list)
    """Relative to the folder."""
    sizes: list[int] = field(default_factory=list)
    """Bytes; 0 where the file cannot be reached, which is found again when its header is read."""
    mtimes_ns: list[int] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    """Folders that cannot be read, and images that cannot be listed -> why."""


BREAK = "its name has a tab or a line break in it, which no list of images can hold: rename it"


def has_break(name: str) -> bool:
    """Whether a name cannot stand in a list of images, a line each."""
    return any(character in name for character in "\t\n\r")


def find_images(top: str, omitted: LeftOut) -> FoundImages:
    """List the images in `top` and below: folder by folder in the order of their paths, in each by name, bytewise.

    Links to folders are followed, as ImageFolder does, unless they lead back to where they lie.

    Args:
        top: path of the folder.
        omitted: what else lies there is counted in it.
    """
    found = FoundImages()
    for place, files in sorted(_folders(top, omitted, found.unread)):
        prefix = place[len(os.fsencode(top)) + 1 :]
        below = os.fsdecode(prefix) + "/" if prefix else ""
        for name, entry in sorted(files):
            _add(found, below + os.fsdecode(name), entry, omitted)
    return found


def _folders(
    top: str, omitted: LeftOut, unread: dict[str, str]
) -> list[tuple[bytes, list[tuple[bytes, os.DirEntry[str]]]]]:
    """The path of `top` and of every folder below, each with its files."""
    found = []
    # With each folder goes where the links on the way to it were and led to.
    pending: list[tuple[str, tuple[str, ...]]] = [(top, ())]
    while pending:
        place, crossed = pending.pop()
        files: list[tuple[bytes, os.DirEntry[str]]] = []
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if not is_folder(entry):
                        files.append((os.fsencode(entry.name), entry))
                    elif is_hidden_folder(entry, omitted):
                        pass
                    elif not entry.is_symlink():
                        pending.append((entry.path, crossed))
                    elif (onward := way_through(place, entry.path, crossed)) is None:
                        omitted.add(left_out.LOOP, entry.path)
                    else:
                        pending.append((entry.path, onward))
        except OSError as error:
            unread[place] = f"the folder cannot be read ({error.strerror})"
        found.append((os.fsencode(place), files))
    return found


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that this user may not enter
        return False


def is_hidden_folder(entry: os.DirEntry[str], omitted: LeftOut) -> bool:
    """Whether a folder is left out for its name; what it holds is counted."""
    of_system = is_folder_of_system(entry.name)
    if not of_system and not entry.name.startswith("."):
        return False
    for place, _, files in os.walk(entry.path):
        for name in files:
            is_photo = not of_system and suffix_of(name) in IMAGE_SUFFIXES and not is_of_system(name)
            omitted.add(left_out.HIDDEN if is_photo else left_out.SYSTEM, os.path.join(place, name))
    return True


def way_through(place: str | os.PathLike[str], link: str, crossed: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The places on the way behind a link to a folder; None if the link leads back to a folder on the way to it.

    Args:
        place: the folder that the link lies in.
        link: its path.
        crossed: the places on the way so far: where links lay and what they led to.
    """
    here, there = os.path.realpath(place), os.path.realpath(link)
    if any(f"{before}/".startswith(there.rstrip("/") + "/") for before in (*crossed, here)):
        return None
    return (*crossed, here, there)


def is_image_file(path: str) -> bool:
    """Whether a file is an image by its suffix or by its content."""
    suffix = suffix_of(os.path.basename(path))
    return suffix in IMAGE_SUFFIXES or (
        suffix not in TEXT_SUFFIXES and os.path.isfile(path) and _is_image_by_content(path)
    )


def _add(found: FoundImages, name: str, entry: os.DirEntry[str], omitted: LeftOut) -> None:
    """List a file, or count why not."""
    suffix = suffix_of(entry.name)
    named_image = suffix in IMAGE_SUFFIXES
    if entry.name[0] == ".":
        hidden_image = named_image and not is_of_system(entry.name)
        omitted.add(left_out.HIDDEN if hidden_image else left_out.SYSTEM, entry.path)
        return
    if not named_image and (suffix in TEXT_SUFFIXES or is_of_system(entry.name)):
        omitted.add(left_out.SYSTEM if is_of_system(entry.name) else left_out.TEXT, entry.path)
        return
    try:
        status = entry.stat()
    except OSError:  # a link to nothing, or to itself: reading the header will say which
        if named_image:
            _list(found, name, 0, 0)
        else:
            omitted.add(left_out.DANGLING, entry.path)
        return
    if not stat.S_ISREG(status.st_mode):  # to open a named pipe would never return
        omitted.add(left_out.IRREGULAR, entry.path)
    elif not named_image and not _is_image_by_content(entry.path):
        omitted.add_suffix(suffix, entry.path)
    elif not name.isprintable() and has_break(name):
        found.unread[entry.path] = BREAK
    else:
        _list(found, name, status.st_size, status.st_mtime_ns)


def _list(found: FoundImages, name: str, size: int, mtime_ns: int) -> None:
    found.names.append(name)
    found.sizes.append(size)
    found.mtimes_ns.append(mtime_ns)


def _is_image_by_content(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return is_image(file.read(HEAD_BYTES))
    except OSError:
        return False
