"""The arithmetic of `bitfleet bench loader`: whose CPU time counts, which photos, what the table says. No rate is asserted."""

import io
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from bitfleet.launch.bench import loader as bench_loader
from bitfleet.launch.bench.loader import CpuClock, take_turn
from bitfleet.launch.bench.loader_contenders import Contender
from bitfleet.launch.bench.loader_manifest import Start, Starts, format_manifest, write_long_manifest
from bitfleet.launch.bench.loader_memory import SmallResult, format_small_images
from bitfleet.launch.bench.loader_photos import find_photos, make_photo, write_class_folders, write_small_copies
from bitfleet.launch.bench.loader_table import (
    BITFLEET,
    BITFLEET_SMALL,
    TIMM,
    TORCHVISION_UINT8,
    Result,
    Turn,
    format_loader,
)
from bitfleet.trainer.data import DataConfig, open_dataset

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


def test_the_clock_counts_this_process_and_its_workers(worker: subprocess.Popen[str]) -> None:
    everything, alone = CpuClock(), CpuClock({psutil.Process(worker.pid)})
    before = everything.seconds(), alone.seconds()
    burn(worker)
    of_worker, of_this = everything.seconds() - before[0], alone.seconds() - before[1]
    assert 0.28 <= of_worker < 0.5  # ticks of 0.01 s
    assert of_this < 0.2
    start = time.process_time()
    while time.process_time() - start < 0.3:
        pass
    assert alone.seconds() - before[1] - of_this >= 0.3
    assert everything.seconds() - before[0] - of_worker >= 0.3


def test_a_worker_that_ends_is_an_error(worker: subprocess.Popen[str]) -> None:
    clock = CpuClock()
    worker.kill()
    worker.wait()
    with pytest.raises(RuntimeError, match="a worker process ended"):
        clock.seconds()


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
    turn = take_turn(Contender("", lambda: prefetching(0.02, depth=3)), num_batches=6, batch_size=10)
    assert 2.0 <= turn.cpu_ms < 3.0  # an item less or more: 0.33; all that is prefetched: 3.0
    assert turn.images_per_second <= 60 / (6 * 0.02) * 1.2
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

    monkeypatch.setattr(bench_loader, "_END_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="worker processes of a loader are still there"):
        take_turn(Contender("", batches), num_batches=1, batch_size=1)
    started[0].kill()
    started[0].communicate()


def test_made_up_photos_are_like_those_of_imagenet() -> None:
    encoded = [make_photo(index) for index in range(25)]
    assert 105e3 < np.mean([len(photo) for photo in encoded]) < 118e3
    assert make_photo(3) == encoded[3]
    images = [Image.open(io.BytesIO(photo)) for photo in encoded]
    assert {image.size for image in images} >= {(500, 375), (375, 500)}
    # The sampling of the first component is 1 x 1 in 4:4:4 and 2 x 2 in 4:2:0.
    assert sum(image.layer[0][1:3] == (1, 1) for image in images) == 19  # type: ignore[attr-defined]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, of which the second has no JPEG."""
    folder = tmp_path / "data"
    for class_name, count, form in (("a", 6, "JPEG"), ("b", 6, "PNG"), ("c", 3, "JPEG")):
        for split in ("train", "val"):
            (folder / split / class_name).mkdir(parents=True)
            for index in range(count):
                size = (300 + index, 600) if class_name == "a" else (400, 280)
                Image.new("RGB", size, (index * 20, 90, 0)).save(
                    folder / split / class_name / f"{index}.JPEG", format=form
                )
    return folder


def test_photos_of_a_root_are_copied_and_shrunk(root: Path, tmp_path: Path) -> None:
    found = find_photos(str(root), num_images=15, num_workers=1)
    assert not found.made_up
    copied = write_class_folders(found, tmp_path / "originals")
    assert copied.classes == ("a", "c")
    assert copied.train.labels.tolist() == [0] * 6 + [1] * 3
    assert copied.train.read(7) == (root / "train/c/1.JPEG").read_bytes()
    small = write_small_copies(copied, tmp_path / "small", num_workers=1)
    assert small.train.labels.tolist() == copied.train.labels.tolist()
    for photos in (copied, small):
        opened = open_dataset(DataConfig(root=str(photos.train.folder)))
        assert opened.classes == photos.classes
        for index in range(len(opened.train)):
            with Image.open(opened.train.path(index)) as image:
                assert image.size == (opened.train.widths[index], opened.train.heights[index])
    assert np.minimum(small.train.heights, small.train.widths).tolist() == [256] * 9
    assert len(find_photos(str(root), num_images=4, num_workers=1).train) == 3  # one of the four is a PNG


def test_photos_without_a_root_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(tmp_path))
    found = find_photos(None, num_images=3, num_workers=1)
    assert found.made_up
    assert [found.train.read(index) for index in range(3)] == [make_photo(index) for index in range(3)]
    monkeypatch.setattr("bitfleet.launch.bench.loader_photos.make_photo", None)
    assert len(find_photos(None, num_images=2, num_workers=1).train) == 2


def test_a_root_without_photos_is_refused() -> None:
    with pytest.raises(ValueError, match="--root fashion-mnist has no JPEG in grey or RGB among 5 training images"):
        find_photos("fashion-mnist", num_images=5, num_workers=1)


def test_a_long_manifest_names_files_that_are_there(tmp_path: Path) -> None:
    write_long_manifest(tmp_path / "long", 3007, 1200)
    dataset = open_dataset(DataConfig(root=str(tmp_path / "long")))
    assert (len(dataset.train), len(dataset.val), len(dataset.classes)) == (3007, 1200, 1000)
    for images in (dataset.train, dataset.val):
        assert len(np.unique(images.names)) == len(images)
        assert np.unique(images.labels).tolist() == list(range(1000))
        for index in (0, 1, len(images) - 1):
            with Image.open(images.path(index)) as image:
                assert image.size == (images.widths[index], images.heights[index])
    assert {len(name) for name in dataset.train.names.tolist()} == {len("train/n01440764/n01440764_10026.JPEG")}
    assert len({path.stat().st_ino for path in (tmp_path / "long" / "photos").iterdir()}) == 16


def test_format_loader() -> None:
    turns = {
        BITFLEET: [Turn(800, 2.0), Turn(1000, 2.2), Turn(900, 2.1)],
        TORCHVISION_UINT8: [Turn(850, 1.9), Turn(1100, 2.2), Turn(900, 2.0)],
        TIMM: [Turn(500, 4.0), Turn(600, 4.4), Turn(500, 4.2)],
        "FFCV": [],
        BITFLEET_SMALL: [Turn(1600, 1.0), Turn(2000, 1.1), Turn(1800, 1.0)],
    }
    text = format_loader(Result(512, 110.4, True, 64, 2, turns, [0.005, 0.02, 0.01]))
    assert "512 made-up photos of 110 kB, batches of 64, 2 threads or workers, median of 3 rounds" in text
    rows = {line[:36].strip(): line[36:].split() for line in text.splitlines()}
    assert rows[BITFLEET] == "900 (800 - 1,000) 2.10 (2.00 - 2.20) 1.00".split()
    assert rows[TIMM] == "500 (500 - 600) 4.20 (4.00 - 4.40) 2.00".split()
    assert rows["FFCV"] == ["not", "installed"]
    ends = {line[2:55].strip(): line[55:].split()[0] for line in text.splitlines() if "(at " in line}
    assert ends == {
        "CPU ms, bitfleet / timm": "0.50",
        "CPU ms, bitfleet / torchvision-v2-uint8": "1.05",
        "bitfleet's sampler, of its CPU time": "0.48%",
        "images/s, files of 256 pixels / originals": "2.00",
    }
    assert "Made-up photos" not in format_loader(Result(512, 110.4, False, 64, 2, turns, [0.005, 0.02, 0.01]))


def test_format_manifest() -> None:
    whole = [Start(seconds, 500_000_000, 540_000_000, 600_000_000) for seconds in (2.0, 1.0, 1.5)]
    text = format_manifest(Starts(1_331_167, whole, Start(0.3, 400_000_000, 410_000_000, 420_000_000)))
    assert "a manifest of 1,331,167 lines, median of 3 new processes" in text
    numbers = [line[38:].split()[0] for line in text.splitlines()[1:]]
    assert numbers == ["1.50", "100", "130", "190"]


def test_format_small_images() -> None:
    turns = {
        "dali": [Turn(10_000, 0.1), Turn(20_000, 0.2), Turn(15_000, 0.3)],
        "torch": [Turn(1_000, 1.0), Turn(4_000, 3.0), Turn(1_500, 2.0)],
        "memory": [Turn(100_000, 0.005), Turn(100_000, 0.004), Turn(120_000, 0.0061)],
    }
    text = format_small_images(SmallResult(5000, 50, 2, turns))
    assert "5,000 images of 32 pixels, batches of 50, 2 threads, median of 3 rounds" in text
    rows = {line.split()[0]: line[16:].split() for line in text.splitlines()[2:5]}
    assert rows["dali"] == "15,000 (10,000 - 20,000) 200.0 (100.0 - 300.0) 1.0".split()
    assert rows["torch"] == "1,500 (1,000 - 4,000) 2000.0 (1000.0 - 3000.0) 0.1".split()
    assert rows["memory"] == "100,000 (100,000 - 120,000) 5.0 (4.0 - 6.1) 8.0".split()
    assert "memory: 100,000 images/s (at least 60,000" in text
