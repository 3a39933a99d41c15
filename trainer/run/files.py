"""Write files atomically and lock folders."""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK = ".lock"
WAIT_SECONDS = 5.0
"""Seconds to wait for a lock: a requeued run may start before the last process of its earlier part
has exited."""


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` when the block ends without an error.

    Readers, and a restart after a crash of the machine, see either the old or the new content. The
    folder is created if missing.

    Raises:
        OSError: the file, which it names, cannot be written; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a name that reaches the disk before its content is an empty file
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # part of a file on a full disk
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write that fails does not say where
        raise
    flush_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, text in UTF-8; see `written_atomically`.

    Raises:
        OSError: the file cannot be written.
    """
    with written_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def flush_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block; other processes wait for it.

    The kernel drops the lock when its holder dies, so a killed rank leaves nothing to clean up. The
    lock file stays: deleting it would let a third process lock a new file of the same name next to
    a second one that waits on the old.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_run(run: Path, option: str = "--run_dir or --output") -> IO[str]:
    """Lock the folder of a run (or a sweep) for this job, until the returned file is closed or the
    process dies.

    Args:
        run: the folder; it is created if missing.
        option: what chooses another one, for the message.

    Raises:
        ValueError: another run is writing into it, or it cannot be created, written or locked.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a+")
    except OSError as error:
        raise ValueError(
            f"the folder {run} cannot be created or written ({error.strerror}): choose another {option}"
        ) from error
    try:
        _lock(file, run, option)
    except BaseException:
        with contextlib.suppress(OSError):  # what a full disk did not take is written again
            file.close()
        raise
    return file


def _lock(file: IO[str], run: Path, option: str) -> None:
    give_up = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > give_up:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise ValueError(
                    f"the folder {run} is in use by {owner}: wait until that run ends, or choose another {option}"
                ) from None
            time.sleep(0.2)
        except OSError as error:  # Lustre without its option flock, NFS without a lock manager
            raise ValueError(
                f"the folder {run} cannot be locked ({error.strerror}): mount its file system with flock, or choose "
                f"another {option}"
            ) from error
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise ValueError(f"the folder {run} cannot be written ({error.strerror}): choose another {option}") from error
