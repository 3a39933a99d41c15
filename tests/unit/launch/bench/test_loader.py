"""`bitfleet bench loader` counts the right CPU time."""

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from bitfleet.launch.bench import loader
from bitfleet.launch.bench.loader import cpu_seconds, take_loader_turn
from bitfleet.launch.bench.timing import Turn

BURN = """
import sys, time
print("ready", flush=True)
for line in sys.stdin:
    start = time.process_time()
    while time.process_time() - start < 0.3:
        pass
    print("done", flush=True)
"""


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[str]]:
    """A process that uses 0.3 s of CPU time for every line that it is sent."""
    with subprocess.Popen(
        [sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


def burn(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write("\n")
    worker.stdin.flush()
    assert worker.stdout.readline() == "done\n"


def test_the_time_of_this_process_and_of_workers_counts(worker: subprocess.Popen[str]) -> None:
    workers = [psutil.Process(worker.pid)]
    before = cpu_seconds(workers), cpu_seconds([])
    burn(worker)
    of_worker, of_this = cpu_seconds(workers) - before[0], cpu_seconds([]) - before[1]
    assert 0.28 <= of_worker < 0.5  # ticks of 0.01 s
    assert of_this < 0.2
    start = time.process_time()
    while time.process_time() - start < 0.3:
        pass
    assert cpu_seconds([]) - before[1] - of_this >= 0.3
    assert cpu_seconds(workers) - before[0] - of_worker >= 0.3


def prefetching(seconds: float, depth: int) -> Iterator[int]:
    """A thread that works `seconds` of CPU time for an item and is `depth` + 1 items ahead."""
    items: queue.Queue[int] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            start = time.thread_time()
            while time.thread_time() - start < seconds:
                pass
            items.put(0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while True:
            yield items.get()
    finally:
        stop.set()
        while thread.is_alive():
            if not items.empty():
                items.get()
            thread.join(0.01)


def test_a_turn_counts_the_work_of_its_batches_and_no_other() -> None:
    before = threading.active_count()
    turn = take_loader_turn(lambda: prefetching(0.02, depth=3), num_batches=6, batch_size=10)
    assert 2.0 <= 1e3 * turn.cpu_seconds < 3.0  # an item less or more: 0.33; all that is prefetched: 3.0
    assert turn.seconds >= 6 * 0.02 / 60 / 1.2
    assert threading.active_count() <= before  # threads of other tests may have ended meanwhile


def test_a_worker_left_behind_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    def batches() -> Iterator[int]:
        started.append(
            subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert started[0].stdout
        started[0].stdout.readline()
        yield from range(10)

    monkeypatch.setattr(loader, "_END_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="worker processes.*still there"):
        take_loader_turn(batches, num_batches=1, batch_size=1)
    started[0].kill()
    started[0].communicate()


def test_rates_and_ratios_of_cpu_time() -> None:
    turns = {
        "bitfleet": [Turn(1 / rate, cpu) for rate, cpu in ((800, 0.002), (1000, 0.0022), (900, 0.0021))],
        "timm": [Turn(1 / rate, cpu) for rate, cpu in ((500, 0.004), (600, 0.0044), (500, 0.0042))],
    }
    bitfleet, timm = loader._rows(turns, "ms")
    assert bitfleet["images/s"] == "900 (850 - 950)"
    assert bitfleet["CPU ms/image"] == "2.1 (2.05 - 2.15)"
    assert timm["CPU ms/image"] == "4.2 (4.1 - 4.3)"
    assert (bitfleet["CPU to bitfleet"], timm["CPU to bitfleet"]) == pytest.approx((1.0, 2.0))
    assert loader._rows(turns, "us")[0]["CPU us/image"] == "2,100 (2,050 - 2,150)"
