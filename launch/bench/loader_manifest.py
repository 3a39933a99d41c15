"""What ImageNet's length costs: seconds to the first batch and memory of a rank, with a made-up manifest of its 1.33 M lines."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from bitfleet.launch.bench.loader_photos import image_list, make_photo, write_jpeg
from bitfleet.launch.data.imagenet import ILSVRC2012
from bitfleet.launch.data.manifest import write_manifest
from bitfleet.trainer.data import DataConfig, TrainLoader, open_dataset
from bitfleet.trainer.data.image_list import Manifest

NUM_TRAIN, NUM_VAL = ILSVRC2012.train, ILSVRC2012.val
_NUM_CLASSES = 1000
_NUM_PHOTOS = 16
_BATCH_SIZE = 64


class Start(NamedTuple):
    """A process that opens a data set and takes a batch."""

    seconds: float
    """From `open_dataset` to the first batch of the training loader, the import of the decoder among it."""
    opened_bytes: int
    """Resident memory once the loader is there."""
    batch_bytes: int
    """Resident memory after the first batch."""
    peak_bytes: int
    """The most resident memory up to then."""


class Starts(NamedTuple):
    """What `bench_manifest` measures."""

    num_lines: int
    whole: list[Start]
    """With all lines, a new process each."""
    tiny: Start
    """With a batch of lines: what modules and decoder take without them."""


def bench_manifest(*, num_rounds: int, num_workers: int, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> Starts:
    """Write a manifest of so many lines and start processes that read it, `num_rounds` of them, one after another."""
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-loader-") as scratch:
        whole, tiny = Path(scratch) / "whole", Path(scratch) / "tiny"
        write_long_manifest(whole, num_train, num_val)
        write_long_manifest(tiny, _BATCH_SIZE, _BATCH_SIZE)
        _start(tiny, num_workers)  # modules and files come into the page cache
        return Starts(
            num_train + num_val, [_start(whole, num_workers) for _ in range(num_rounds)], _start(tiny, num_workers)
        )


def write_long_manifest(folder: Path, num_train: int, num_val: int) -> None:
    """Write a manifest whose images have names like ImageNet's, all different, and are sixteen photos.

    Every class folder is a link to one folder, in which hard links give every photo many names.
    """
    photos = folder / "photos"
    photos.mkdir(parents=True)
    facts = [write_jpeg(f"{photos}/{index}.jpg", make_photo(index)) for index in range(_NUM_PHOTOS)]
    classes = tuple(f"n{10_000_000 + label}" for label in range(min(_NUM_CLASSES, num_train, num_val)))
    lists = []
    for split, count, form in (
        ("train", num_train, "n00000000_{:05d}.JPEG"),
        ("val", num_val, "ILSVRC2012_val_{:08d}.JPEG"),
    ):
        labels = np.arange(count) * len(classes) // count
        in_class = np.arange(count) - np.searchsorted(labels, labels)  # place within its class
        files = [form.format(number) for number in range(int(in_class.max()) + 1)]
        for number, file in enumerate(files):
            (photos / file).hardlink_to(photos / f"{number % _NUM_PHOTOS}.jpg")
        (folder / split).mkdir()
        for class_name in classes:
            (folder / split / class_name).symlink_to(photos)
        pairs = zip(labels.tolist(), in_class.tolist(), strict=True)
        names = np.array([f"{split}/{classes[label]}/{files[number]}".encode() for label, number in pairs])
        rows = np.array(facts)[in_class % _NUM_PHOTOS]
        lists.append(image_list(folder, names, labels, rows))
    train, val = lists
    write_manifest(Manifest(train=train, val=val, classes=classes, layout="bench loader"), folder)


def first_batch(root: str, num_workers: int) -> Start:
    """Open the data set and take a batch of its training loader; meant for a new process."""
    config = DataConfig(
        root=root, image_size=224, augmentation="random_resized_crop", device="cpu", num_threads=num_workers
    )
    start = time.perf_counter()
    loader = TrainLoader(
        open_dataset(config),
        config,
        seed=0,
        global_batch_size=_BATCH_SIZE,
        num_replicas=1,
        device=torch.device("cpu"),
        rank=0,
        world_size=1,
        local_world_size=1,
    )
    opened = psutil.Process().memory_info().rss
    next(loader.batches())
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return Start(seconds, opened, psutil.Process().memory_info().rss, int(peak) * 1024)


def format_manifest(starts: Starts) -> str:
    """Medians, and what has a bound."""
    seconds, opened, batch, peak = (statistics.median(values) for values in zip(*starts.whole, strict=True))
    tiny = starts.tiny
    rounds = f"median of {len(starts.whole)} new processes"
    return "\n".join(
        [
            f"a manifest of {starts.num_lines:,} lines, {rounds}; memory: more than with one of {_BATCH_SIZE} lines",
            f"  open_dataset to the first batch     {seconds:8.2f} s   (at most 3; with {_BATCH_SIZE} lines {tiny.seconds:.2f})",
            f"  memory of data set and loader       {(opened - tiny.opened_bytes) / 1e6:8.0f} MB  (at most 300)",
            f"  memory after the first batch        {(batch - tiny.batch_bytes) / 1e6:8.0f} MB",
            f"  peak until then                     {(peak - tiny.batch_bytes) / 1e6:8.0f} MB",
        ]
    )


def _start(root: Path, num_workers: int) -> Start:
    code = f"from bitfleet.launch.bench.loader_manifest import first_batch; print(*first_batch({str(root)!r}, {num_workers}))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    seconds, *sizes = done.stdout.split()[-len(Start._fields) :]
    return Start(float(seconds), *map(int, sizes))
