"""Recognise the layout of a data set: each imported module registers one."""

import contextlib
import os
from pathlib import Path

from bitfleet.launch.data import archives, cifar, class_folders, kaggle, webdataset  # noqa: F401
from bitfleet.launch.data.source import LAYOUTS, PartialLayout, Source
from bitfleet.launch.data.webdataset import SHARD_SUFFIXES
from bitfleet.trainer.data.left_out import shown

_PACKED = (".zip", ".rar", ".7z", ".tar.zst", *SHARD_SUFFIXES)
_MOST_SEARCHED, _MOST_NAMED = 100, 5  # entries of a folder that is not a data set


def recognise(source: Path) -> Source:
    """Return the data set in `source`, a folder or, for CIFAR-10, its archive.

    Raises:
        ValueError: There is none, it is there in part, or there are several.
    """
    try:
        if not source.exists():
            raise ValueError(f"SOURCE {source} does not exist; {_looked_for()}")
        sources, partial = _detect(source)
    except OSError as error:
        raise ValueError(
            f"SOURCE {source} cannot be read ({error.strerror}: {error.filename}); allow this user to read it"
        ) from None
    if len(sources) > 1:
        raise ValueError(
            f"SOURCE {source} has data in more than one form ({', '.join(one.layout for one in sources)}): give a "
            "folder that has one of them, of links if need be"
        )
    if sources:
        return sources[0]
    if source.is_file():
        raise ValueError(f"SOURCE {source} is a file; give the folder that it lies in; {_looked_for()}")
    if partial:
        raise ValueError(f"SOURCE {source}: {'; '.join(partial)}")
    raise ValueError(f"SOURCE {source} has no data set in a known form{_content_of(source)}; {_looked_for()}")


def _looked_for() -> str:
    return "looked for: " + "; ".join(layout.looks_for for layout in LAYOUTS)


def _detect(source: Path) -> tuple[list[Source], list[str]]:
    """Return the data sets in `source`, and a sentence for each that is there in part."""
    sources, partial = [], []
    for layout in LAYOUTS:
        try:
            if one := layout.detect(source):
                sources.append(one)
        except PartialLayout as error:
            partial.append(str(error))
    return sources, partial


def _content_of(source: Path) -> str:
    """Describe a data set one folder deeper, or name what is there."""
    names = sorted((name for name in os.listdir(source) if not name.startswith(".")), key=os.fsencode)
    for folder in (source / name for name in names[:_MOST_SEARCHED]):
        with contextlib.suppress(OSError):  # lost+found, say
            if folder.is_dir() and (sources := _detect(folder)[0]):
                return f"; {folder} has one ({sources[0].layout}): give that"
    if packed := [name for name in names if name.lower().endswith(_PACKED)]:
        return f"; unpack {', '.join(map(shown, packed[:_MOST_NAMED]))} first"
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f" (there is {', '.join(map(shown, names[:_MOST_NAMED]))}{more})" if names else " (it is empty)"
