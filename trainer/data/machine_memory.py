"""Share memory between the ranks of a machine, to keep decoded images once."""

import contextlib
import fcntl
import itertools
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

_HEADER_BYTES = 64
_NEXT, _DONE = 0, 1  # int64 of the header: the next job to take, and the number of finished ones
_POLL_SECONDS = 0.01
_SILENT_SECONDS = 300.0

_numbers = itertools.count()  # equal on all ranks of a job, which make the same memories in the same order


class MachineMemory:
    """Bytes shared by all ranks of a job on one machine, initially 0, and a queue of work.

    They lie in a memfd, which has no name in any file system: Linux frees the memory when the last
    process that maps it ends, however it ends, and the size of /dev/shm does not matter. The first
    rank creates it and writes its number into a small file in the folder for temporary files; the
    others open it through /proc. The last rank to join removes the file.
    """

    def __init__(self, num_bytes: int, *, job: str | None, num_ranks: int) -> None:
        """Create the memory, or open the one that another rank has created.

        Args:
            num_bytes: Size, the same on every rank.
            job: Word that only the ranks of this job know; None for a process that shares nothing.
            num_ranks: Ranks of the job on this machine.

        Raises:
            ValueError: The machine has less memory available.
        """
        self._signpost: Path | None = None
        self._file: int | None = None
        if job is not None and num_ranks > 1:
            self._signpost = Path(tempfile.gettempdir()) / f"bitfleet-{job}-{next(_numbers)}"
            self._file = _shared_file(self._signpost, _HEADER_BYTES + num_bytes, num_ranks)
        if self._file is None:
            _check_available(num_bytes)
        mapped = mmap.mmap(-1 if self._file is None else self._file, _HEADER_BYTES + num_bytes)
        self._header = np.frombuffer(mapped, np.int64, 2)
        self._thread_lock = threading.Lock()
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(mapped, np.uint8, num_bytes, _HEADER_BYTES)
        """uint8 [num_bytes]; valid longer than this object."""

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]
        if getattr(self, "_signpost", None) is not None:
            self._signpost.unlink(missing_ok=True)  # type: ignore[union-attr]

    @property
    def all_have_joined(self) -> bool:
        """True if no other rank will open this memory any more."""
        return self._signpost is None or not self._signpost.exists()

    def take_jobs(self, num_jobs: int) -> Iterator[int]:
        """Yield job numbers below num_jobs, each on one rank only, the next one that is ready."""
        while True:
            with self._locked():
                job = int(self._header[_NEXT])
                self._header[_NEXT] += 1
            if job >= num_jobs:
                return
            yield job

    def finish_job(self) -> int:
        """Count a taken job as finished; return the number of finished jobs of all ranks."""
        with self._locked():
            self._header[_DONE] += 1
            return int(self._header[_DONE])

    def wait_for_jobs(self, num_jobs: int, check: Callable[[int], None]) -> None:
        """Wait until all jobs of all ranks are finished.

        Args:
            num_jobs: Number of all jobs.
            check: Called repeatedly with the number of finished jobs; may raise to end the waiting.

        Raises:
            ValueError: No job has finished for _SILENT_SECONDS.
        """
        last, since = -1, time.monotonic()
        while (done := int(self._header[_DONE])) < num_jobs:
            check(done)
            if done != last:
                last, since = done, time.monotonic()
            if time.monotonic() - since > _SILENT_SECONDS:
                raise ValueError(
                    f"another rank of this machine has decoded nothing for {_SILENT_SECONDS:g} s: check the disk and "
                    "that rank, or use --data.loader dali"
                )
            time.sleep(_POLL_SECONDS)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._thread_lock:  # flock does not exclude threads of one process
            if self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX)
            yield
            if self._file is not None:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def _shared_file(signpost: Path, num_bytes: int, num_ranks: int) -> int | None:
    """Return the memfd of the first rank to open `signpost`; None if this rank cannot open it."""
    with open(os.open(signpost, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        if content := file.read().split():
            process, descriptor, num_present = map(int, content)
            memfd = _opened_memfd(process, descriptor, signpost.name)
        else:
            _check_available(num_bytes)
            descriptor = os.memfd_create(signpost.name)
            os.ftruncate(descriptor, num_bytes)
            process, num_present, memfd = os.getpid(), 0, descriptor
        file.seek(0)
        file.write(f"{process} {descriptor} {num_present + 1}\n")
        if num_present + 1 == num_ranks:
            signpost.unlink()
    return memfd


def _opened_memfd(process: int, descriptor: int, name: str) -> int | None:
    path = f"/proc/{process}/fd/{descriptor}"
    with contextlib.suppress(OSError):
        if os.readlink(path) == f"/memfd:{name} (deleted)":
            # Opened, not inherited: a lock belongs to an open file description, and every rank
            # needs its own.
            return os.open(path, os.O_RDWR)
    print(  # processes have other numbers there, or are hidden
        f"bitfleet: process {os.getpid()} cannot see process {process}, which has the decoded images in memory (is it "
        "in another container?), and keeps its own copy",
        file=sys.stderr,
        flush=True,
    )
    return None


def _check_available(num_bytes: int) -> None:
    import psutil  # here: a machine that benchmarks a GPU may lack it

    available = psutil.virtual_memory().available
    if num_bytes > available:
        raise ValueError(
            f"data.loader='memory' needs {num_bytes / 2**30:.2f} GiB for decoded images and this machine has "
            f"{available / 2**30:.2f} GiB available: use --data.loader dali"
        )
