"""Run jobs on many images with all cores: a pool of processes and a progress bar."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from bitfleet.trainer.data.memory_pipeline import progress_bar

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], weights: Sequence[int], *, num_workers: int, title: str
) -> list[Result]:
    """Return `function(job)` of every job, in order.

    Args:
        function: A top-level function of a module; its argument and result can be pickled.
        jobs: Small jobs, tens of images each, so that progress shows and all workers end together.
        weights: Images of each job, which the progress bar counts.
        num_workers: Number of processes; 1 works in this process.
        title: Title of the progress bar.

    Raises:
        ValueError: From a job, or a worker process died.
    """
    results = []
    with progress_bar(title, sum(weights)) as bar:
        in_this_process = num_workers == 1 or len(jobs) <= 1
        for weight, result in zip(
            weights, map(function, jobs) if in_this_process else _in_pool(function, jobs, num_workers), strict=True
        ):
            results.append(result)
            bar.update(weight)
    return results


def _in_pool(function: Callable[[Job], Result], jobs: Sequence[Job], num_workers: int) -> Iterator[Result]:
    # Spawned, not forked: threads of this process (DALI, torch) would not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=context, initializer=_init_worker)
    try:
        yield from pool.map(function, jobs)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process died (killed, or out of memory): start the command again, it continues"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _init_worker() -> None:
    """End this worker silently at Ctrl-C, and when its parent dies.

    It would wait for jobs of a dead parent indefinitely, since it holds both ends of their pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
