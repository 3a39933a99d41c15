"""Keep what is computed or unpacked once in the cache folder of this machine."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bitfleet.trainer.run.files import locked


def cache_folder() -> Path:
    """Return, and create, $BITFLEET_CACHE or $XDG_CACHE_HOME/bitfleet or ~/.cache/bitfleet.

    Raises:
        ValueError: The folder cannot be created or written.
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
    """Hold the lock file `path`.lock during the block; other processes that want it wait.

    Raises:
        ValueError: The block, or the lock, cannot be written to the disk.
    """
    try:
        with locked(path.with_name(path.name + ".lock")):
            yield
    except OSError as error:
        raise ValueError(
            f"the cache folder {path.parent} cannot be written ({error.strerror or error}); make room there, or set "
            "BITFLEET_CACHE to another folder"
        ) from None
