"""Read hostfiles (`node1 slots=8` per line, as DeepSpeed and Open MPI do), and check that hosts can
be reached."""

import dataclasses
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Host:
    """A machine of the job: its name, and the number of ranks there."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of the file at `path`, in its order; the first one has rank 0.

    Raises:
        ValueError: there is no such file, or a line cannot be read (its number is named).
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the hostfile {path}: {error.strerror}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)(\s+#.*)?", text)
        if not match:
            raise ValueError(f"{path}, line {number}: a host is written as `node1 slots=8`, not {text!r}")
        name, slots = match[1], int(match[2])
        if name in hosts:
            raise ValueError(
                f"{path}, line {number}: {name} is there twice: write one line per host, with all its slots"
            )
        if slots == 0:
            raise ValueError(
                f"{path}, line {number}: {name} has 0 slots: a host has at least one rank; else remove the line"
            )
        hosts[name] = slots
    if not hosts:
        raise ValueError(f"the hostfile {path} names no host: write a line `node1 slots=8` for each")
    return [Host(name, slots) for name, slots in hosts.items()]


SSH_SECONDS = 30.0
"""Time limit for the answer of a host; ssh gives up connecting after a third of it."""


def check_reachable(names: Sequence[str], ssh_options: str) -> None:
    """Check that ssh runs a command on every host of `names`.

    Raises:
        ValueError: it does not; the hosts are named, with ssh's reason.
    """
    with ThreadPoolExecutor(max_workers=32) as pool:
        reasons = pool.map(lambda name: _why_unreachable(name, ssh_options), names)
        missing = [f"{name} ({reason})" for name, reason in zip(names, reasons, strict=True) if reason]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"ssh does not reach {', '.join(missing[:3])}{more}: `ssh HOST true` must work here without a password, "
            "for every host"
        )


def _why_unreachable(name: str, ssh_options: str) -> str:
    seconds = int(SSH_SECONDS / 3)
    command = ["ssh", *shlex.split(ssh_options), "-o", f"ConnectTimeout={seconds}", name, "true"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SSH_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {SSH_SECONDS:g} s"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].strip() if done.returncode else ""


def is_here(name: str, own_names: Sequence[str] | None = None) -> bool:
    """Return True if `name` means this machine; tests pass its names as `own_names`."""
    own = own_names if own_names is not None else (socket.gethostname(), socket.getfqdn())
    return name in ("localhost", "127.0.0.1", "::1", *own, *(full.partition(".")[0] for full in own))


def reachable_address(name: str, resolve: Callable[[str], str] = socket.gethostbyname) -> str | None:
    """Return the address under which other machines reach `name`; None if it does not resolve here,
    or to loopback only.

    By default DeepSpeed takes the first address that the machine lists, which may be a container
    bridge's.
    """
    try:
        address = resolve(name)
    except OSError:
        return None
    return None if address.startswith("127.") else address
