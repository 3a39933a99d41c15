"""The cache folder of this machine: what is computed or unpacked once and found again by name."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bitfleet.trainer.run.files import locked


def cache_folder() -> Path:
    """Return $BITFLEET_CACHE, else $XDG_CACHE_HOME/bitfleet, else ~/.cache/bitfleet; made if it is missing.

    Raises:
        ValueError: The folder cannot be made or written.
    """
    if named := os.environ.get("BITFLEET_CACHE"):
        folder = Path(named)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitfleet"
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(
            f"the cache folder {folder} cannot be written; set BITFLEET_CACHE to a folder that you can write to"
        )
    return folder


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold `path`.lock for the time of the block, against every other process that asks for the same path.

    Raises:
        ValueError: the disk does not take what the block writes, or the lock.
    """
    try:
        with locked(path.with_name(path.name + ".lock")):
            yield
    except OSError as error:
        raise ValueError(
            f"the cache folder {path.parent} cannot be written ({error.strerror or error}); make room there, or set "
            "BITFLEET_CACHE to another folder"
        ) from None
