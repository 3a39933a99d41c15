"""Work on many images by all cores: a pool of processes and a progress bar."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")

_LINE_SECONDS = 10.0  # between two lines of progress where the output is a file
_AHEAD = 4  # jobs handed out for each worker: enough that none waits, few enough that an interrupt stops soon


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], weights: Sequence[int], *, num_workers: int, title: str
) -> list[Result]:
    """Return `function(job)` of every job, in their order.

    Args:
        function: of a module's top level; it gets and returns what can be pickled.
        jobs: small ones, tens of images each, so that progress is seen and all workers end together.
        weights: images of each job: what the progress counts.
        num_workers: processes; with 1 the work is done in this one.
        title: what is being done, for the progress bar.

    Raises:
        ValueError: one that a job raised, or a worker process died.
    """
    progress = Bar(title, sum(weights))
    try:
        if num_workers == 1 or len(jobs) <= 1:
            return [progress.after(weight, function(job)) for job, weight in zip(jobs, weights, strict=True)]
        return _run_in_pool(function, jobs, weights, num_workers, progress)
    finally:
        progress.close()


def _run_in_pool(
    function: Callable[[Job], Result], jobs: Sequence[Job], weights: Sequence[int], num_workers: int, progress: "Bar"
) -> list[Result]:
    # Spawned, not forked: threads of this process (DALI, torch) would not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=context, initializer=_begin_worker)
    results: dict[int, Result] = {}
    pending: dict[Future[Result], int] = {}
    waiting = iter(enumerate(jobs))
    try:
        while len(results) < len(jobs):
            while len(pending) < _AHEAD * num_workers and (following := next(waiting, None)):
                pending[pool.submit(function, following[1])] = following[0]
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                index = pending.pop(future)
                results[index] = progress.after(weights[index], future.result())
    except BrokenProcessPool:
        raise ValueError(
            "a worker process died (killed, or out of memory): start the command again, it goes on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [results[index] for index in range(len(jobs))]


def _begin_worker() -> None:
    """Let this worker end without a word at Ctrl-C, and when its parent was killed.

    It would wait for the jobs of a dead parent for ever, since it holds both ends of their pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Bar:
    """A bar on a terminal, a line now and then in a file."""

    def __init__(self, title: str, total: int) -> None:
        """`total` images are to be counted."""
        self._title, self._total, self._done = title, total, 0
        self._bar = tqdm(total=total, desc=title, unit="image", disable=not sys.stderr.isatty(), smoothing=0.05)
        self._start = self._last_line = time.monotonic()

    def after(self, weight: int, result: Result) -> Result:
        """Count `weight` images; returns `result`."""
        self._done += weight
        self._bar.update(weight)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate / 60
            print(
                f"{self._title}: {self._done:,} of {self._total:,} images, {rate:,.0f} a second, {left:,.0f} min left",
                flush=True,
            )
        return result

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
