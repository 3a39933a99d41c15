"""Time bitfleet's loaders against others, and on small images.

The time is that of the work on the CPU until a batch is ready to go to the device, with the same
number of decoding threads or worker processes, the files in the page cache.
"""

import functools
import gc
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, io, transforms
from torchvision.transforms import v2

from bitfleet.launch.bench.command import Loader
from bitfleet.launch.bench.photos import (
    SMALL_SIZE,
    find_photos,
    shrink,
    train_batches,
    write_class_folders,
    write_small_images,
)
from bitfleet.launch.bench.results import Row, spread, titled
from bitfleet.launch.bench.timing import Turn, interleave, ratio
from bitfleet.launch.job import num_cores
from bitfleet.trainer.data import DataConfig, open_dataset

BITFLEET, BITFLEET_SMALL = "bitfleet", "bitfleet, files of 256 pixels"
SIZE = 224
_QUIET_SECONDS = 0.3
_POLL_SECONDS = 0.01  # reading the clocks of workers takes 0.1 ms of each
_QUIET_CPU_SECONDS = 0.015  # more than one tick of the kernel's clock, which counts in steps of 0.01 s
_LONGEST_WAIT_SECONDS = 120.0
_END_SECONDS = 10.0
Start = Callable[[], Iterator[object]]
"""Start a loader; deleting the iterator and gc.collect() end its threads and processes."""


def bench_loader(options: Loader) -> Iterator[str]:
    """Measure the loaders that `options` ask for.

    Raises:
        ValueError: options that exclude each other, a root that is not a data set, or fewer images
            than a batch.
    """
    if options.memory and options.root:
        raise ValueError("bench loader --memory does not take --root: its images are synthetic")
    num_workers = options.num_workers or num_cores()
    sizes, epochs, unit = ((50, 5000), 4, "us") if options.memory else ((64, 512), 1, "ms")
    batch_size, num_images = options.batch_size or sizes[0], options.images or sizes[1]
    if batch_size > num_images:
        raise ValueError(f"--batch_size {batch_size} must not exceed the {num_images} images: raise --images")
    num_batches = max(epochs * (num_images // batch_size), 4 * num_workers)
    num_batches += -num_batches % num_workers  # as many for each worker, so that they end together
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-loader-") as folder:
        if options.memory:
            title = f"{num_images:,} images of {SMALL_SIZE} pixels"
            loaders = small_contenders(write_small_images(Path(folder), num_images), batch_size, num_workers)
        else:
            photos = find_photos(options.root, num_images, num_workers)
            kilobytes = statistics.mean(len(photo.encoded) for photo in photos) / 1e3
            title = f"{len(photos)} {'' if options.root else 'synthetic '}photos of {kilobytes:.0f} kB"
            with ThreadPoolExecutor(num_workers) as pool:
                small = write_class_folders(list(pool.map(shrink, photos)), Path(folder) / "small")
            loaders = contenders(
                write_class_folders(photos, Path(folder) / "originals"), small, batch_size, num_workers
            )
        turns = {
            name: functools.partial(take_loader_turn, start, num_batches, batch_size) for name, start in loaders.items()
        }
        rows = _rows(interleave(turns, options.rounds, warm_up=0), unit)
    details = f"batches of {batch_size}, {num_workers} threads or workers"
    yield titled(f"{title}, {details}, median of {options.rounds} rounds (quartiles)", rows)


def cpu_seconds(workers: Iterable[psutil.Process]) -> float:
    """Return user and system time of this process and of `workers`, which must be alive."""
    times = [worker.cpu_times() for worker in workers]
    return time.process_time() + float(sum(each.user + each.system for each in times))


def wait_for_rest(workers: Iterable[psutil.Process]) -> float:
    """Wait until next to no CPU time is used; return the perf_counter() at which that began.

    Raises:
        RuntimeError: it takes longer than two minutes.
    """

    def used_by_others() -> float:  # not by this thread, which reads the clocks
        return cpu_seconds(workers) - time.thread_time()

    first = last = time.perf_counter()
    used = used_by_others()
    while (now := time.perf_counter()) - last < _QUIET_SECONDS:
        if now - first > _LONGEST_WAIT_SECONDS:
            raise RuntimeError("a loader does not come to rest: it works although nothing is taken from it")
        time.sleep(_POLL_SECONDS)
        if used_by_others() - used > _QUIET_CPU_SECONDS:
            last, used = time.perf_counter(), used_by_others()
    return last


def take_loader_turn(start: Start, num_batches: int, batch_size: int) -> Turn:
    """Start a loader, take `num_batches` from it, and end its workers; the times are per image.

    It is measured between two moments at which the loader rests, because it has prefetched as much
    as it may: in between it has made exactly the batches that were taken. Its start and its first
    batches come before.
    """
    gc.collect()  # a worker forked while a DALI pipeline waits for the collector would collect it as well, and hang
    before = set(psutil.Process().children(recursive=True))
    batches = start()
    _take(batches, 2)
    workers = set(psutil.Process().children(recursive=True)) - before
    wait_for_rest(workers)
    begin, cpu_begin = time.perf_counter(), cpu_seconds(workers)
    _take(batches, num_batches)
    end = wait_for_rest(workers)
    used = cpu_seconds(workers) - cpu_begin
    del batches
    gc.collect()
    _, alive = psutil.wait_procs(workers, timeout=_END_SECONDS)
    if alive:
        raise RuntimeError(f"worker processes of a loader are still there: {alive}")
    num_images = num_batches * batch_size
    return Turn((end - begin) / num_images, used / num_images)


def _take(batches: Iterator[object], count: int) -> None:
    for _ in range(count):
        next(batches)


def _rows(turns: Mapping[str, list[Turn]], unit: str) -> list[Row]:
    """Return a row per loader; CPU time in `unit`, and over that of the first loader."""
    scale = {"us": 1e6, "ms": 1e3}[unit]
    costs = {title: [scale * turn.cpu_seconds for turn in values] for title, values in turns.items()}
    first = next(iter(turns))
    return [
        {
            "what": title,
            "images/s": spread([1 / turn.seconds for turn in values]),
            f"CPU {unit}/image": spread(costs[title]),
            f"CPU to {first}": ratio(costs[title], costs[first]),
        }
        for title, values in turns.items()
    ]


def contenders(originals: Path, small: Path, batch_size: int, num_workers: int) -> dict[str, Start]:
    """Return loaders with ImageNet's training transform, endless streams of shuffled batches.

    That is a random window of 8-100 % of the area, resized to 224 x 224 with antialiasing, half of
    them mirrored. timm's is the loader inside its PrefetchLoader: uint8, normalized later.
    """
    sizes = batch_size, num_workers
    return {
        BITFLEET: _bitfleet(originals, *sizes),
        "bitfleet, loader=torch": _bitfleet(originals, *sizes, loader="torch"),
        "bitfleet, preprocessing=official": _bitfleet(originals, *sizes, preprocessing="official"),
        "torchvision v2, uint8": lambda: _torchvision(originals, *sizes, pil=False),
        "torchvision, PIL, float32": lambda: _torchvision(originals, *sizes, pil=True),
        "timm create_loader, uint8": lambda: _timm(originals, *sizes),
        BITFLEET_SMALL: _bitfleet(small, *sizes),
    }


def small_contenders(root: Path, batch_size: int, num_workers: int) -> dict[str, Start]:
    """Return every `data.loader`, with the windows of binarynet_cifar10."""
    torch.set_num_threads(num_workers)
    fields: dict[str, Any] = {"augmentation": "pad_crop", "image_size": SMALL_SIZE}
    return {
        name: _bitfleet(root, batch_size, num_workers, loader=name, **fields) for name in ("dali", "torch", "memory")
    }


def _bitfleet(root: Path, batch_size: int, num_workers: int, **options: Any) -> Start:
    defaults: dict[str, Any] = {"augmentation": "random_resized_crop", "image_size": SIZE, "device": "cpu"}
    config = DataConfig(root=str(root), num_threads=num_workers, **defaults | options)
    return lambda: train_batches(open_dataset(config), config, batch_size, torch.device("cpu"))


def _torchvision(root: Path, batch_size: int, num_workers: int, *, pil: bool) -> Iterator[object]:
    options: dict[str, Any] = {}
    if pil:
        to_float = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        crop = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), *to_float])
    else:
        # Deprecated since torchvision 0.29, in favour of a library that is not installed with it.
        warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
        options["loader"] = _decode_rgb
        crop = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    dataset = datasets.ImageFolder(str(root / "train"), crop, **options)
    # One endless iteration: prefetching would pause between two epochs, which are short here.
    order = RandomSampler(dataset, num_samples=1 << 40)
    return iter(DataLoader(dataset, batch_size, sampler=order, num_workers=num_workers))


def _decode_rgb(path: str) -> torch.Tensor:
    image: torch.Tensor = io.decode_image(io.read_file(path), mode=io.ImageReadMode.RGB)
    return image


def _timm(root: Path, batch_size: int, num_workers: int) -> Iterator[object]:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(root), split="train", is_training=True),
        input_size=(3, SIZE, SIZE),
        batch_size=batch_size,
        is_training=True,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=num_workers,
        use_prefetcher=True,
        use_multi_epochs_loader=True,  # prefetching does not pause between two epochs
        device=torch.device("cpu"),
    )
    # Inside of the PrefetchLoader, whose own work is a copy to the device and the normalization
    # there.
    return itertools.chain.from_iterable(itertools.repeat(loader.loader))
