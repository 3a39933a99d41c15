"""Report a disk that does not answer, with the path, instead of hanging."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TypeVar

from bitfleet.trainer.data.image_list import shard_and_member
from bitfleet.trainer.data.request import Request

Result = TypeVar("Result")

_PROBE_SECONDS = 5.0


def call_within(function: Callable[[], Result], seconds: float, path: Path) -> Result:
    """Return the result of `function`, which reads `path`.

    Raises:
        ValueError: It took longer than `seconds`.
        Exception: From `function`.
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
    """Return the result of `future`.

    If the disk was gone and answers again, wait once more for `seconds`: the queued reads have only
    just resumed.

    Args:
        future: Reads or decodes images of `in_flight` in another thread.
        seconds: Longest wait before the files are probed.
        in_flight: Requests whose files are probed.

    Raises:
        ValueError: A file does not answer, or the wait took twice as long.
        Exception: From `future`.
    """
    for _ in range(2):
        wait([future], seconds)
        path = None if future.done() else _silent_file(list(in_flight))
        if future.done():  # perhaps during the probe
            return future.result()
        if path is not None:
            raise _silence(path, seconds)
    raise ValueError(
        f"the disk is too slow: a batch of images could not be read within {2 * seconds:g} s, though every file of it "
        "answers now; check the disk or the load of this machine, or raise data.stall_seconds, and continue with "
        "--resume auto"
    )


def _silence(path: str, seconds: float) -> ValueError:
    return ValueError(
        f"the disk does not answer: {path} could not be read within {seconds:g} s; check the disk or network mount "
        "below data.root, then continue with --resume auto (data.stall_seconds sets the limit)"
    )


def _silent_file(requests: list[Request]) -> str | None:
    """Return the first file that does not answer within _PROBE_SECONDS; None if all do."""
    path = ""
    last_answer = time.monotonic()
    finished = threading.Event()

    def read_all() -> None:
        nonlocal path, last_answer
        for request in requests:
            for position in range(len(request.samples)):
                path = request.path(position)
                file = Path(path) if request.images.offsets is None else Path(shard_and_member(path)[0])
                try:
                    with file.open("rb") as opened:
                        opened.read(1)
                except OSError:
                    continue  # an answer
                last_answer = time.monotonic()
        finished.set()

    threading.Thread(target=read_all, daemon=True).start()
    while not finished.wait(0.05):
        if time.monotonic() - last_answer > _PROBE_SECONDS:
            return path or None
    return None
