"""Build a C source file of the package with the system's compiler, once per machine, and load it.

No header of torch is needed, so a build takes about a second. The result is kept in a cache folder
($BITFLEET_CACHE, else $XDG_CACHE_HOME/bitfleet, else ~/.cache/bitfleet), under a name that depends
on the source, the compiler and the CPU.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

PORTABLE_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fPIC")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC")


class CLibraryError(ValueError):
    """A C source file cannot be built or loaded here; the message says why."""


def load_c_library(source: Path) -> ctypes.CDLL:
    """Load the functions of `source`, building it first where the cache folder does not hold it.

    Its OpenMP calls bind to the runtime that torch has loaded, so both share one pool of threads.

    Raises:
        CLibraryError: there is no compiler, it fails, or the cache folder cannot be used.
    """
    # Linked without an OpenMP library, its calls bind to the one that torch has loaded. A torch
    # without one, or with another kind, does not load it: then the functions run on one thread.
    return _load_first(source, ((*FLAGS, "-fopenmp"), ()), (FLAGS, ()))


def load_portable_c_library(source: Path) -> ctypes.CDLL:
    """Load the functions of `source`, which choose instructions themselves; torch is not needed.

    They run on one thread if the compiler has no OpenMP.

    Raises:
        CLibraryError: there is no compiler, it fails, or the cache folder cannot be used.
    """
    return _load_first(source, ((*PORTABLE_FLAGS, "-fopenmp"), ("-fopenmp", "-lm")), (PORTABLE_FLAGS, ("-lm",)))


def _load_first(source: Path, *ways: tuple[tuple[str, ...], tuple[str, ...]]) -> ctypes.CDLL:
    """Load what the first of `ways`, flags and libraries, that works makes of `source`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CLibraryError("no C compiler (cc or gcc) on the PATH: install gcc")
    problem = ""
    for flags, libraries in ways:
        try:
            return load_built(source, compiler, flags, libraries)
        except subprocess.CalledProcessError as error:
            problem = f"{' '.join(error.cmd)}: {_last_line(error.stderr)}"
        except (OSError, RuntimeError) as error:  # the latter where there is no home folder
            problem = f"{error} ($BITFLEET_CACHE may name another folder)"
    raise CLibraryError(problem)


def load_built(source: Path, compiler: str, flags: tuple[str, ...], libraries: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Load what `compiler` makes of `source` with `flags`, from the cache folder if it is there."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [file.read_text() for file in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, compiler, version, *flags, *libraries, _cpu()]).encode()).hexdigest()
    path = _cache_folder() / f"{source.stem}-{key[:16]}.so"
    if path.exists():
        with contextlib.suppress(OSError):  # damaged: built again
            return ctypes.CDLL(str(path))
    _build(source, compiler, flags, libraries, path)
    return ctypes.CDLL(str(path))


def _build(source: Path, compiler: str, flags: tuple[str, ...], libraries: tuple[str, ...], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several ranks may build at once: each renames its own finished file over the others'.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        compiled, linked = Path(folder, f"{source.stem}.o"), Path(folder, f"{source.stem}.so")
        for command in (
            [compiler, *flags, "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), *libraries],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True)
        with linked.open("rb") as file:
            os.fsync(file.fileno())  # a file cut short by a crash would fault when it is used
        linked.replace(path)


def _cpu() -> str:
    """Identify the CPU as -march=native sees it; different machines may share a home folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "flags", "CPU part", "Features", "isa")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _cache_folder() -> Path:
    if own := os.environ.get("BITFLEET_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bitfleet"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
