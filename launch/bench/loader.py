"""What loading costs: bitfleet's training loader against torchvision's, timm's, WebDataset's and FFCV's, on the same files.

Every loader gives ImageNet's training transform: a random window of 8-100 % of the area, resized to 224 x 224 with antialiasing,
half of them mirrored. What is counted is the work until a batch is ready to go to the device, on the CPU, with the same number
of decoding threads or worker processes, the files in the page cache.
"""

import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bitfleet.launch.bench.loader_contenders import ORIGINALS, SMALL, Contender, Settings, contenders, sampler_alone
from bitfleet.launch.bench.loader_photos import find_photos, write_class_folders, write_small_copies
from bitfleet.launch.bench.loader_table import Result, Turn

_WARM_UP_BATCHES = 2
_QUIET_SECONDS = 0.3
_QUIET_CPU_SECONDS = 0.015  # more than one tick of the kernel's clock, which counts in steps of 0.01 s
_LONGEST_WAIT_SECONDS = 120.0
_END_SECONDS = 10.0


def bench_loader(root: str | None, *, num_images: int, num_rounds: int, batch_size: int, num_workers: int) -> Result:
    """Measure every contender in turns, each once a round, in an order that rotates.

    Args:
        root: A data set to take photos from; None makes some.
        num_images: Photos that are taken; a turn reads at least as many.
        num_rounds: Turns of a contender.
        batch_size: Images in a batch.
        num_workers: Decoding threads or worker processes of each contender.

    Raises:
        ValueError: `root` is no data set, or has fewer photos than a batch.
    """
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-loader-") as name:
        scratch, settings = Path(name), Settings(batch_size, num_workers)
        photos = write_class_folders(find_photos(root, num_images, num_workers), scratch / ORIGINALS)
        if len(photos.train) < batch_size:
            raise ValueError(
                f"--batch_size {batch_size} must not exceed the {len(photos.train)} photos; lower it, or raise --images"
            )
        write_small_copies(photos, scratch / SMALL, num_workers)
        entries = contenders(scratch, settings)
        present = [entry for entry in entries if entry.installed]
        turns: dict[str, list[Turn]] = {entry.title: [] for entry in entries}
        sampler_ms = []
        num_batches = max(len(photos.train) // batch_size, 4 * num_workers)
        num_batches += -num_batches % num_workers  # as many for each worker, so that they end together
        for count in range(num_rounds):
            first = count % len(present)
            for entry in present[first:] + present[:first]:
                turns[entry.title].append(take_turn(entry, num_batches, batch_size))
            sampler_ms.append(sampler_alone(scratch / ORIGINALS, settings))
    sizes = photos.train.sizes
    return Result(len(sizes), float(sizes.mean()) / 1e3, photos.made_up, batch_size, num_workers, turns, sampler_ms)


def take_turn(contender: Contender, num_batches: int, batch_size: int) -> Turn:
    """Start a contender, take `num_batches` from it, and end its workers.

    It is measured between two moments at which it rests, because it has prefetched as much as it may: in between it has made
    exactly the batches that were taken, whatever its queues hold. Its start and its first batches are before that.
    """
    gc.collect()  # a worker forked while a DALI pipeline waits for the collector would collect it as well, and hang
    before = set(psutil.Process().children(recursive=True))
    batches = contender.batches()
    _take(batches, _WARM_UP_BATCHES)
    clock = CpuClock(before)
    clock.wait_for_rest()
    start, cpu_start = time.perf_counter(), clock.seconds()
    _take(batches, num_batches)
    end = clock.wait_for_rest()
    cpu_seconds = clock.seconds() - cpu_start
    del batches
    gc.collect()
    _wait_for_end(before)
    num_images = num_batches * batch_size
    return Turn(num_images / (end - start), cpu_seconds / num_images * 1e3)


class CpuClock:
    """CPU time of this process and of all its descendants, without what reading it takes."""

    def __init__(self, ignored: set[psutil.Process] | None = None) -> None:
        """Find the descendants, which must live as long as this clock is read; `ignored` ones are not counted."""
        self._workers = [p for p in psutil.Process().children(recursive=True) if p not in (ignored or set())]
        self._reading = 0.0

    def seconds(self) -> float:
        """User and system time since some moment.

        Raises:
            RuntimeError: a worker process has ended, and its time with it.
        """
        start = time.thread_time()
        try:
            workers = [worker.cpu_times() for worker in self._workers]
        except psutil.NoSuchProcess as error:
            raise RuntimeError(f"a worker process ended while it was measured: {error}") from None
        own = time.process_time()
        self._reading += time.thread_time() - start
        return own - self._reading + float(sum(times.user + times.system for times in workers))

    def wait_for_rest(self) -> float:
        """Wait until next to no CPU time is used any more; returns the time.perf_counter() at which that began.

        Raises:
            RuntimeError: it takes longer than two minutes.
        """
        first = last = time.perf_counter()
        used = self.seconds()
        while (now := time.perf_counter()) - last < _QUIET_SECONDS:
            if now - first > _LONGEST_WAIT_SECONDS:
                raise RuntimeError("a loader does not come to rest: it works although nothing is taken from it")
            time.sleep(0.005)
            if self.seconds() - used > _QUIET_CPU_SECONDS:
                last, used = time.perf_counter(), self.seconds()
        return last


def _take(batches: Iterator[object], count: int) -> None:
    for _ in range(count):
        next(batches)


def _wait_for_end(before: set[psutil.Process]) -> None:
    started = [process for process in psutil.Process().children(recursive=True) if process not in before]
    _, alive = psutil.wait_procs(started, timeout=_END_SECONDS)
    if alive:
        raise RuntimeError(f"worker processes of a loader are still there: {alive}")
