"""A disk that does not answer: said as such, with the path, and not as a run that hangs."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from bitfleet.trainer.data.images import shard_and_member
from bitfleet.trainer.data.request import Request

Result = TypeVar("Result")

_PROBE_SECONDS = 5.0


def call_within(function: Callable[[], Result], seconds: float, path: Path) -> Result:
    """`function()`, which reads `path`.

    Raises:
        ValueError: it took longer than `seconds`.
        Exception: what `function` raises.
    """
    results: list[Result | BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)  # if it never returns, the process ends without it
    thread.start()
    thread.join(seconds)
    if not results:
        raise _silence(str(path), seconds)
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


def result_within(future: Future[Result], seconds: float, in_flight: Iterable[Request]) -> Result:
    """Wait for `future`.

    A disk that was gone for a while and answers again gets as long once more: what waited for it has only begun to go on.

    Args:
        future: reads or decodes images of `in_flight`, in a thread of its own.
        seconds: how long that may take.
        in_flight: whose files are asked, should it take longer.

    Raises:
        ValueError: it took longer, and a file that does not answer is the reason, or it took twice as long.
        Exception: what the work raises.
    """
    for _ in range(2):
        wait([future], seconds)
        path = None if future.done() else _silent_file(list(in_flight))
        if future.done():  # perhaps while the disk was asked
            return future.result()
        if path is not None:
            raise _silence(path, seconds)
    raise ValueError(
        f"the disk is too slow: a batch of images could not be read within {2 * seconds:g} s, though every file of it answers "
        "now; look after the disk or the load of this machine, or raise data.stall_seconds, and continue with --resume auto"
    )


def _silence(path: str, seconds: float) -> ValueError:
    return ValueError(
        f"the disk does not answer: {path} could not be read within {seconds:g} s; look after the disk or network mount "
        "below data.root, then continue with --resume auto (data.stall_seconds sets the limit)"
    )


def _silent_file(requests: list[Request]) -> str | None:
    """The first file of `requests` that cannot be opened and read within some seconds; None if all can."""
    current: list[str] = []
    finished = threading.Event()

    def read_all() -> None:
        for request in requests:
            for position in range(len(request.samples)):
                path = request.path(position)
                current[:] = [path]
                file = Path(path) if request.images.offsets is None else Path(shard_and_member(path)[0])
                try:
                    with file.open("rb") as opened:
                        opened.read(1)
                except OSError:
                    continue  # an answer
                seen[0] = time.monotonic()
        finished.set()

    seen = [time.monotonic()]
    threading.Thread(target=read_all, daemon=True).start()
    while not finished.wait(0.05):
        if time.monotonic() - seen[0] > _PROBE_SECONDS:
            return current[0] if current else None
    return None
