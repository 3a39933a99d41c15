"""What `bitfleet data prepare` extracts lies in DEST.unfinished until all of it is there and checked."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bitfleet.trainer.data.index import header_size

_IDENTITY = "source.json"


def unfinished_folder(dest: Path) -> Path:
    """DEST.unfinished, beside DEST."""
    return dest.with_name(dest.name + ".unfinished")


def begin(dest: Path, layout: str, archives: Sequence[Path]) -> Path:
    """Make DEST.unfinished, or continue the one of the same archives; returns it.

    Raises:
        ValueError: it was begun from other archives.
    """
    folder = unfinished_folder(dest)
    file = folder / _IDENTITY
    identity = {"layout": layout, "archives": {archive.name: archive.stat().st_size for archive in archives}}
    if file.exists():
        if file.read_text() != json.dumps(identity):
            raise ValueError(
                f"{folder} was begun from other archives than {', '.join(map(str, archives))}: choose another DEST, or "
                "remove that folder"
            )
    elif folder.exists() and any(not entry.name.startswith(".tmp-") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is in the way: bitfleet did not make it; choose another DEST, or move that folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(identity).encode())
    return folder


def finish(folder: Path, dest: Path) -> None:
    """Turn DEST.unfinished into DEST, once everything in it has reached the disk."""
    os.sync()
    folder.rename(dest)  # an empty DEST is replaced
    (dest / _IDENTITY).unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it: under its own name it is whole."""
    unfinished = path.with_name(f".tmp-{path.name}")
    unfinished.write_bytes(content)
    unfinished.rename(path)


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
        ValueError: another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another bitfleet data prepare is at work on {dest}: wait until it ends") from None
        # Whoever held it may have removed it after it was opened here: then a third one may hold a new file of this name.
        if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
            raise ValueError(f"another bitfleet data prepare was at work on {dest} a moment ago: start again")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
