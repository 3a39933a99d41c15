"""One process group a run folder: a lock that the operating system lets go of when its owner dies, however that happens."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK = ".lock"
WAIT_SECONDS = 5.0
"""A run that is requeued may start before the last process of its earlier part has left."""


def lock_run(run: Path, option: str = "--run_dir") -> IO[str]:
    """Take the folder of a run (or a sweep) for this process; it is released when the returned file is closed or the process
    ends.

    Args:
        run: the folder; it is made if need be.
        option: what chooses another one, for the message.

    Raises:
        ValueError: another run is writing into it.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = (run / LOCK).open("a+")
    give_up = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > give_up:
                file.seek(0)
                owner = file.read().strip() or "another process"
                file.close()
                raise ValueError(
                    f"the folder {run} is in use by {owner}: wait until that run ends, or choose another {option}"
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
