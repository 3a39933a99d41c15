"""Write DEST.unfinished: one command at a time, continued after a kill, renamed to DEST at the end.

Its files are written under temporary names and renamed without an fsync each: waiting for the disk
after every one of a million images would take hours, and one os.sync before the folder is renamed
does the same.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitfleet.trainer.data.decoding import header_size

_PLAN = ".plan.json"


@contextlib.contextmanager
def unfinished_folder(dest: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """Give the folder DEST.unfinished to the block, and rename it to `dest` if the block succeeds.

    Args:
        dest: An absolute path.
        plan: Settings and sources; a folder that a killed process left is continued only for an
            equal plan.

    Raises:
        ValueError: `dest` has something in it, is being written by another process, was started
            with another plan, or cannot be written.
    """
    folder = dest.with_name(dest.name + ".unfinished")
    with lock_dest(dest.with_name(dest.name + ".lock"), dest):
        if os.path.lexists(dest) and not (dest.is_dir() and not any(dest.iterdir())):
            raise ValueError(f"{dest} exists already: give another name, or remove it first")
        if dest.is_symlink() or os.path.ismount(dest):
            kind = "link" if dest.is_symlink() else "mount point"
            raise ValueError(f"{dest} is a {kind}, which a finished folder cannot replace: give a new name in it")
        _start(folder, plan)
        try:
            yield folder
        except BaseException:
            if not is_started(folder):  # refused before anything was written
                shutil.rmtree(folder)
            raise
        os.sync()
        folder.rename(dest)  # an empty DEST is replaced
        (dest / _PLAN).unlink()


def is_started(folder: Path) -> bool:
    """Return True if something was written into an unfinished folder."""
    return any(path.name != _PLAN for path in folder.iterdir())


def write_unsynced(path: Path, content: bytes) -> None:
    """Write a file; see `written_unsynced`."""
    with written_unsynced(path) as unfinished:
        unfinished.write_bytes(content)


@contextlib.contextmanager
def written_unsynced(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` if the block succeeds, without an fsync.

    Raises:
        ValueError: The file cannot be written.
    """
    unfinished = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.rename(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}): fix that and rerun the same command, it continues"
        ) from None


def shape_if_written(path: Path, size: int) -> tuple[int, int] | None:
    """Return height and width of a readable image of `size` bytes at `path`, else None."""
    try:
        return header_size(str(path)) if path.stat().st_size == size else None
    except (FileNotFoundError, ValueError):
        return None


def check_space(folder: Path, needed: int) -> None:
    """Compare the free space with the bytes that are still to be written.

    Args:
        folder: DEST.unfinished; what it holds already is subtracted.
        needed: Bytes of all that it will hold.

    Raises:
        ValueError: The disk is too small; both numbers are named.
    """
    written = sum(os.lstat(os.path.join(path, name)).st_size for path, _, names in os.walk(folder) for name in names)
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if (missing := max(0, needed - written)) > free:
        raise ValueError(
            f"the disk of {folder} has {free / 2**30:,.1f} GiB free and {missing / 2**30:,.1f} GiB are still to be "
            "written: make room, or choose a DEST on another disk"
        )


@contextlib.contextmanager
def lock_dest(lock: Path, dest: Path) -> Iterator[None]:
    """Hold the file `lock` during the block, then remove it; it ends with its holder.

    Unlike `files.locked`, a second process is refused instead of waiting.

    Raises:
        ValueError: Another process holds it, or it cannot be created.
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
            # A process that opened the file before its last holder deleted it has locked a file
            # that is gone.
            held = os.path.samestat(lock.stat(), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise ValueError(f"another process is making {dest}: wait for its end, or give another DEST")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _start(folder: Path, plan: Mapping[str, Any]) -> None:
    file = folder / _PLAN
    folder.mkdir(parents=True, exist_ok=True)
    if not is_started(folder):
        try:
            file.write_text(json.dumps(plan))
        except OSError as error:
            raise ValueError(f"{file} cannot be written ({error.strerror}): fix that and start again") from None
    elif _plan_in(file) != plan:
        raise ValueError(
            f"{folder} was started with other settings or from other data: remove it, or give another DEST"
        )


def _plan_in(file: Path) -> Any:
    """Return the plan in `file`; None if it is missing or damaged, as after a power failure."""
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
