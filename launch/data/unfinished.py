"""A folder in the making: DEST.unfinished, written by one command at a time, continued after a kill, renamed at the end."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitfleet.trainer.data.index import header_size

_PLAN = ".plan.json"


@contextlib.contextmanager
def unfinished_folder(dest: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """Give the folder DEST.unfinished to the block, and rename it to `dest` when the block ends without an error.

    Args:
        dest: An absolute path.
        plan: What the folder is made from; one that a killed process left is continued only for an equal plan.

    Raises:
        ValueError: `dest` has something in it, is being made by another process, was begun with another plan, or cannot be
            written.
    """
    folder = dest.with_name(dest.name + ".unfinished")
    with only_one(dest.with_name(dest.name + ".lock"), dest):
        if os.path.lexists(dest) and not (dest.is_dir() and not any(dest.iterdir())):
            raise ValueError(f"{dest} exists already: give another name, or remove it first")
        _begin(folder, plan)
        try:
            yield folder
        except BaseException:
            if not is_begun(folder):  # refused before anything was written
                shutil.rmtree(folder)
            raise
        os.sync()
        folder.rename(dest)  # an empty DEST is replaced
        (dest / _PLAN).unlink()


def is_begun(folder: Path) -> bool:
    """Whether something was written into an unfinished folder."""
    return any(path.name != _PLAN for path in folder.iterdir())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it: under its own name it is whole.

    Raises:
        ValueError: it cannot be written.
    """
    with being_written(path) as unfinished:
        unfinished.write_bytes(data)


@contextlib.contextmanager
def being_written(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` when the block ends without an error.

    Raises:
        ValueError: it cannot be written.
    """
    unfinished = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.rename(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}): put that right and give the same command again, it goes on"
        ) from None


def written_before(path: Path, size: int) -> tuple[int, int] | None:
    """Height and width of the image at `path` if it is there, has `size` bytes and a header that can be read, else None."""
    try:
        return header_size(str(path)) if path.stat().st_size == size else None
    except (FileNotFoundError, ValueError):
        return None


def check_space(folder: Path, needed: int) -> None:
    """Compare the free space with the bytes that are still to be written.

    Args:
        folder: DEST.unfinished; what lies in it already is taken off.
        needed: bytes of all that is to lie in it.

    Raises:
        ValueError: there is too little; both numbers are named.
    """
    there = sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if (missing := max(0, needed - there)) > free:
        raise ValueError(
            f"the disk of {folder} has {free / 2**30:,.1f} GiB free and {missing / 2**30:,.1f} GiB are still to be written: "
            "make room, or choose a DEST on another disk"
        )


@contextlib.contextmanager
def only_one(lock: Path, dest: Path) -> Iterator[None]:
    """Hold the file `lock` for the time of the block and remove it then; the kernel lets go of it when its holder dies.

    Raises:
        ValueError: another process holds it, or it cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise ValueError(
            f"{dest} cannot be made ({error.strerror}: {error.filename}): give a place that you can write to"
        ) from None
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One who opened the file before its last holder deleted it has the lock of a file that nobody else sees.
            held = os.path.samestat(lock.stat(), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise ValueError(f"another process is making {dest}: wait for its end, or give another DEST")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _begin(folder: Path, plan: Mapping[str, Any]) -> None:
    file = folder / _PLAN
    folder.mkdir(parents=True, exist_ok=True)
    if not is_begun(folder):
        try:
            file.write_text(json.dumps(plan))
        except OSError as error:
            raise ValueError(f"{file} cannot be written ({error.strerror}): put that right and start again") from None
    elif not file.exists() or json.loads(file.read_bytes()) != plan:
        raise ValueError(f"{folder} was begun with other settings or from other data: remove it, or give another DEST")
