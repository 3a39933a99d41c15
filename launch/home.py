"""Give a home folder to a user who has none, as in a container that runs under an arbitrary user
id."""

import os
import pwd
import tempfile
from collections.abc import MutableMapping
from pathlib import Path


def have_home(environ: MutableMapping[str, str]) -> None:
    """Complete `environ` so that torch, Triton and matplotlib find a user name and a home folder.

    HOME becomes a folder of this user below the one for temporary files where neither it nor the
    password file names one that can be written. If a user of the password file sets HOME, it is
    used.
    """
    number = os.getuid()
    known = _known(number)
    if known is None and not any(environ.get(name) for name in ("LOGNAME", "USER")):
        environ["USER"] = f"uid{number}"
    home = environ.get("HOME")
    if (home and known is not None) or _can_write(home or known or ""):
        return
    folder = Path(tempfile.gettempdir()) / f"bitfleet-home-{number}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_own = folder.lstat().st_uid == number and not folder.is_symlink()
    except OSError:  # there is a file of that name
        is_own = False
    environ["HOME"] = str(folder) if is_own else tempfile.mkdtemp(prefix="bitfleet-home-")


def _known(number: int) -> str | None:
    """Return the home folder that the password file names for the user `number`; None if it has no
    such user."""
    try:
        return pwd.getpwuid(number).pw_dir
    except KeyError:
        return None


def _can_write(folder: str) -> bool:
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
