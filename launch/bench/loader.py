"""Time bitfleet's loaders: against others, on small images, and with a long manifest.

The time is that of the work on the CPU until a batch is ready to go to the device, with the same
number of decoding threads or worker processes, the files in the page cache.
"""

import functools
import gc
import importlib.util
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, io, transforms
from torchvision.transforms import v2

from bitfleet.launch.bench.command import Loader
from bitfleet.launch.bench.photos import (
    SMALL_SIZE,
    find_photos,
    image_list,
    make_photo,
    write_class_folders,
    write_jpeg,
    write_small_copies,
    write_small_images,
)
from bitfleet.launch.bench.step import in_new_process
from bitfleet.launch.bench.timing import Turn, interleave, ratio, spread, titled
from bitfleet.launch.data.imagenet import ILSVRC2012
from bitfleet.launch.data.manifest import write_manifest
from bitfleet.launch.job import num_cores
from bitfleet.trainer.data import DataConfig, TrainLoader, open_dataset
from bitfleet.trainer.data.image_list import Manifest

BITFLEET, BITFLEET_SMALL = "bitfleet", "bitfleet, files of 256 pixels"
TORCHVISION_UINT8, TIMM = "torchvision-v2-uint8", "timm create_loader, uint8"
SIZE = 224
LEAST_RATE = 60_000
"""Images/s that data.loader memory should give on two threads."""
NUM_TRAIN, NUM_VAL = ILSVRC2012.train, ILSVRC2012.val
_QUIET_SECONDS = 0.3
_QUIET_CPU_SECONDS = 0.015  # more than one tick of the kernel's clock, which counts in steps of 0.01 s
_LONGEST_WAIT_SECONDS = 120.0
_END_SECONDS = 10.0
_SAMPLER_SECONDS = 0.2
_TURN_SECONDS = 0.5  # of small images
Start = Callable[[], Iterator[object]]
"""Start a loader; deleting the iterator and gc.collect() end its threads and processes."""


def bench_loader(options: Loader) -> Iterator[str]:
    """Measure the loaders that `options` ask for.

    Raises:
        ValueError: options that exclude each other, a root that is not a data set, or fewer images
            than a batch.
    """
    mode = "--manifest" if options.manifest else "--memory"
    given: dict[str, object] = {"--memory": options.memory, "--root": options.root}
    if options.manifest:
        given |= {"--images": options.images, "--batch_size": options.batch_size}
    wrong = [name for name, value in given.items() if value and name != mode]
    if wrong and (options.manifest or options.memory):
        raise ValueError(f"bench loader {mode} does not take {wrong[0]}")
    num_workers = options.num_workers or num_cores()
    measure = measure_manifest if options.manifest else measure_small if options.memory else measure_photos
    yield measure(options, num_workers)


class CpuClock:
    """CPU time of this process and of all its descendants, without the time that reading it takes.

    The descendants are found once and must live as long as the clock is read.
    """

    def __init__(self, ignored: set[psutil.Process] | None = None) -> None:
        self._workers = [p for p in psutil.Process().children(recursive=True) if p not in (ignored or set())]
        self._reading = 0.0

    def seconds(self) -> float:
        """Return user and system time since some moment.

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
        """Wait until next to no CPU time is used; return the perf_counter() at which that began.

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
    clock = CpuClock(before)
    clock.wait_for_rest()
    begin, cpu_begin = time.perf_counter(), clock.seconds()
    _take(batches, num_batches)
    end = clock.wait_for_rest()
    cpu_seconds = clock.seconds() - cpu_begin
    del batches
    gc.collect()
    started = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(started, timeout=_END_SECONDS)
    if alive:
        raise RuntimeError(f"worker processes of a loader are still there: {alive}")
    num_images = num_batches * batch_size
    return Turn((end - begin) / num_images, cpu_seconds / num_images)


def _take(batches: Iterator[object], count: int) -> None:
    for _ in range(count):
        next(batches)


def _take_turns(loaders: Mapping[str, tuple[Start, int]], batch_size: int, num_rounds: int) -> dict[str, list[Turn]]:
    turns = {title: functools.partial(take_loader_turn, *entry, batch_size) for title, entry in loaders.items()}
    return interleave(turns, num_rounds, warm_up=0)


def _rate_rows(turns: Mapping[str, list[Turn]], unit: str, reference: str) -> list[list[str]]:
    scale, form = (1e6, ".1f") if unit == "us" else (1e3, ".2f")
    rows = [["", "images/s", f"CPU {unit}/image", f"CPU to {reference}"]]
    for title, values in turns.items():
        costs = [scale * turn.cpu_seconds for turn in values]
        rates = spread([1 / turn.seconds for turn in values], ",.0f")
        rows.append([title, rates, spread(costs, form), f"{_cpu_ratio(turns, title, reference):.2f}"])
    return rows


def _cpu_ratio(turns: Mapping[str, list[Turn]], title: str, other: str) -> float:
    first, second = ([turn.cpu_seconds for turn in turns[name]] for name in (title, other))
    return ratio(first, second)


def measure_photos(options: Loader, num_workers: int) -> str:
    """Compare loaders that give ImageNet's training transform.

    That is a random window of 8-100 % of the area, resized to 224 x 224 with antialiasing, half of
    them mirrored.
    """
    batch_size = options.batch_size or 64
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-loader-") as name:
        originals, small = Path(name) / "originals", Path(name) / "small"
        root = str(options.root) if options.root else None
        photos = write_class_folders(find_photos(root, options.images or 512, num_workers), originals)
        num_images = len(photos.train)
        if num_images < batch_size:
            raise ValueError(
                f"--batch_size {batch_size} must not exceed the {num_images} photos; lower it, or raise --images"
            )
        write_small_copies(photos, small, num_workers)
        num_batches = max(num_images // batch_size, 4 * num_workers)
        num_batches += -num_batches % num_workers  # as many for each worker, so that they end together
        loaders = contenders(originals, small, batch_size, num_workers)
        turns = _take_turns(
            {title: (start, num_batches) for title, start in loaders.items()}, batch_size, options.rounds
        )
        sampler = [sampler_alone(originals, batch_size, num_workers) for _ in range(options.rounds)]
        kilobytes = float(photos.train.sizes.mean()) / 1e3
    share = ratio(sampler, [turn.cpu_seconds for turn in turns[BITFLEET]])
    speed_up = ratio(*([turn.seconds for turn in turns[title]] for title in (BITFLEET, BITFLEET_SMALL)))
    lines = [
        titled(
            f"{num_images} {'synthetic ' * photos.synthetic}photos of {kilobytes:.0f} kB, batches of {batch_size}, "
            f"{num_workers} threads or workers, median of {options.rounds} rounds (least - most)",
            _rate_rows(turns, "ms", BITFLEET),
        ),
        f"  CPU ms, bitfleet / timm: {_cpu_ratio(turns, BITFLEET, TIMM):.2f} (at most 0.70)",
        f"  CPU ms, bitfleet / torchvision: {_cpu_ratio(turns, BITFLEET, TORCHVISION_UINT8):.2f} (at most 1.05)",
        f"  CPU time of bitfleet's sampler: {share:.2%} (at most 1 %)",
        f"  images/s, files of 256 pixels / originals: {speed_up:.2f} (at least 1.8)",
        "  Where other processes use the cores, images/s say little; CPU ms hold.",
    ]
    missing = [name for name in ("webdataset", "ffcv") if not _installed(name)]
    return "\n".join([*lines, *[f"  not installed: {', '.join(missing)}"] * bool(missing)])


def train_loader(root: Path, batch_size: int, num_workers: int, **options: Any) -> TrainLoader:
    """Return bitfleet's training loader of one rank for a data set."""
    defaults: dict[str, Any] = {"image_size": SIZE, "augmentation": "random_resized_crop", "device": "cpu"}
    config = DataConfig(root=str(root), num_threads=num_workers, **defaults | options)
    ranks = {"num_replicas": 1, "rank": 0, "world_size": 1, "local_world_size": 1}
    return TrainLoader(
        open_dataset(config), config, seed=0, global_batch_size=batch_size, device=torch.device("cpu"), **ranks
    )


def contenders(originals: Path, small: Path, batch_size: int, num_workers: int) -> dict[str, Start]:
    """Return the loaders that are installed, each an endless stream of shuffled training batches.

    timm's is the one inside its PrefetchLoader: images as uint8, normalized later. FFCV's is
    written by its documentation, but has not been run; it reads copies encoded again at quality 90,
    which are easier than the originals.
    """
    decoder, decode = _decoder()
    sizes = batch_size, num_workers

    def bitfleet(root: Path = originals, **options: Any) -> Start:
        return lambda: train_loader(root, *sizes, **options).batches()

    loaders = {
        BITFLEET: bitfleet(),
        "bitfleet, loader=torch": bitfleet(loader="torch"),
        "bitfleet, preprocessing=official": bitfleet(preprocessing="official"),
        TORCHVISION_UINT8: lambda: _torchvision(originals, *sizes, pil=False),
        "torchvision, PIL, float32": lambda: _torchvision(originals, *sizes, pil=True),
        TIMM: lambda: _timm(originals, *sizes),
        f"decoding alone, {decoder}": lambda: _decoding(originals, *sizes, decode),
        BITFLEET_SMALL: bitfleet(small),
    }
    if _installed("webdataset"):
        loaders["WebDataset, PIL, uint8"] = lambda: _webdataset(originals, *sizes)
    if _installed("ffcv"):
        loaders["FFCV, JPEG of quality 90, uint8"] = lambda: _ffcv(originals, *sizes)
    return loaders


def sampler_alone(root: Path, batch_size: int, num_workers: int) -> float:
    """Return the CPU seconds per image for order, windows, flips and paths, before any file is
    read."""
    requests = train_loader(root, batch_size, num_workers).requests()
    next(requests)
    start, count = time.process_time(), 0
    while time.process_time() - start < _SAMPLER_SECONDS:
        next(requests)
        count += 1
    return (time.process_time() - start) / (count * batch_size)


def _torchvision(root: Path, batch_size: int, num_workers: int, *, pil: bool) -> Iterator[object]:
    options: dict[str, Any] = {}
    if pil:
        to_float = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        crop = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), *to_float])
    else:
        _accept_torchvision_io()
        options["loader"] = _decode_rgb
        crop = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    dataset = datasets.ImageFolder(str(root / "train"), crop, **options)
    # One endless iteration, so that prefetching does not pause between two epochs, which are short
    # here.
    order = RandomSampler(dataset, num_samples=1 << 40)
    return iter(DataLoader(dataset, batch_size, sampler=order, num_workers=num_workers))


def _decode_rgb(path: str) -> torch.Tensor:
    image: torch.Tensor = io.decode_image(io.read_file(path), mode=io.ImageReadMode.RGB)
    return image


def _accept_torchvision_io() -> None:
    # Deprecated since torchvision 0.29, in favour of a library that is not installed with it; still
    # what people use.
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)


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


def _webdataset(root: Path, batch_size: int, num_workers: int) -> Iterator[object]:
    import webdataset

    folder = root.parent / "shards"
    if not folder.exists():
        images = open_dataset(DataConfig(root=str(root))).train
        folder.mkdir()
        for worker in range(num_workers):  # a shard each: a worker without one would be an error
            with webdataset.TarWriter(f"{folder}/{worker:06d}.tar") as shard:
                for index in range(worker, len(images), num_workers):
                    label = int(images.labels[index])
                    shard.write({"__key__": f"{index:07d}", "jpg": images.read(index), "cls": label})
    to_uint8 = transforms.PILToTensor()
    crop = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), to_uint8])
    shards = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=100).repeat()
    stream = shards.shuffle(1000).decode("pil").to_tuple("jpg", "cls").map_tuple(crop, int)
    return iter(webdataset.WebLoader(stream, batch_size=batch_size, num_workers=num_workers))


def _ffcv(root: Path, batch_size: int, num_workers: int) -> Iterator[object]:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor
    from ffcv.writer import DatasetWriter

    file = root.parent / "photos.beton"
    folder = datasets.ImageFolder(str(root / "train"))
    if not file.exists():
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
        DatasetWriter(str(file), fields, num_workers=num_workers).from_indexed_dataset(folder)
    crop = [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()]
    loader = Loader(
        str(file),
        batch_size=batch_size,
        num_workers=num_workers,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(len(folder)), 100),  # its threads rest between two epochs, which are short here
        drop_last=True,
        pipelines={"image": crop, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _decoding(root: Path, batch_size: int, num_workers: int, decode: Callable[[bytes], object]) -> Iterator[object]:
    """Decode images from memory on threads; a batch is only their number."""
    images = open_dataset(DataConfig(root=str(root))).train
    encoded = itertools.cycle([images.read(index) for index in range(len(images))])
    with ThreadPoolExecutor(num_workers) as pool:
        while True:
            yield sum(1 for _ in pool.map(decode, itertools.islice(encoded, batch_size)))


def _decoder() -> tuple[str, Callable[[bytes], object]]:
    """The thinnest cover of libjpeg-turbo that is installed."""
    if _installed("simplejpeg"):
        import simplejpeg

        return "simplejpeg", simplejpeg.decode_jpeg
    _accept_torchvision_io()
    rgb = io.ImageReadMode.RGB
    return "torchvision.io", lambda jpeg: io.decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), rgb)


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def measure_small(options: Loader, num_workers: int) -> str:
    """Compare data.loader dali, torch and memory on PNGs with the windows of binarynet_cifar10."""
    num_images, batch_size = options.images or 5000, options.batch_size or 50
    if batch_size > num_images:
        raise ValueError(
            f"--batch_size {batch_size} must not exceed --images {num_images}; lower it, or raise --images"
        )
    torch.set_num_threads(num_workers)
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-loader-") as name:
        root = write_small_images(Path(name), num_images)
        kind = {"image_size": SMALL_SIZE, "augmentation": "pad_crop"}

        def start(loader: str) -> Iterator[object]:
            return train_loader(root, batch_size, num_workers, loader=loader, **kind).batches()

        starts: dict[str, Start] = {loader: functools.partial(start, loader) for loader in ("dali", "torch", "memory")}
        entries = {loader: (begin, _batches_per_turn(begin)) for loader, begin in starts.items()}
        turns = _take_turns(entries, batch_size, options.rounds)
    rate = statistics.median(1 / turn.seconds for turn in turns["memory"])
    table = titled(
        f"{num_images:,} images of {SMALL_SIZE} pixels, batches of {batch_size}, {num_workers} threads, median of "
        f"{options.rounds} rounds (least - most)",
        _rate_rows(turns, "us", "dali"),
    )
    return f"{table}\n  memory: {rate:,.0f} images/s (at least {LEAST_RATE:,} on two threads that are free)"


def _batches_per_turn(start: Start) -> int:
    """Return the number of batches that take about _TURN_SECONDS."""
    batches = start()
    _take(batches, 10)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < _TURN_SECONDS:
        next(batches)
        count += 1
    return count


def measure_manifest(options: Loader, num_workers: int) -> str:
    """Write a manifest of ImageNet's length and read it in new processes, one after another."""
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-loader-") as scratch:
        long, tiny = Path(scratch) / "long", Path(scratch) / "tiny"
        write_long_manifest(long, NUM_TRAIN, NUM_VAL)
        write_long_manifest(tiny, 64, 64)

        def read(root: Path) -> list[float]:
            code = f"from bitfleet.launch.bench import loader; print(*loader.first_batch({str(root)!r}, {num_workers}))"
            return [float(word) for word in in_new_process(code).split()[-3:]]

        starts = interleave({"long": lambda: read(long), "tiny": lambda: read(tiny)}, options.rounds)
    seconds, opened, batch = (statistics.median(values) for values in zip(*starts["long"], strict=True))
    tiny_seconds, tiny_opened, tiny_batch = (statistics.median(each) for each in zip(*starts["tiny"], strict=True))
    return titled(
        f"a manifest of {NUM_TRAIN + NUM_VAL:,} lines, {options.rounds} new processes; memory: more than with 64 lines",
        [
            ["open_dataset to the first batch", f"{seconds:.2f} s", f"(at most 3; with 64 lines {tiny_seconds:.2f})"],
            ["memory of data set and loader", f"{(opened - tiny_opened) / 1e6:.0f} MB", "(at most 300)"],
            ["memory after the first batch", f"{(batch - tiny_batch) / 1e6:.0f} MB", ""],
        ],
        "<><",
    )


def write_long_manifest(folder: Path, num_train: int, num_val: int) -> None:
    """Write a manifest with names like ImageNet's, all different, of sixteen photos.

    Every class folder is a link to one folder, in which hard links give every photo many names.
    """
    photos = folder / "photos"
    photos.mkdir(parents=True)
    sizes = np.array([write_jpeg(f"{photos}/{index}.jpg", make_photo(index)) for index in range(16)])
    classes = tuple(f"n{10_000_000 + label}" for label in range(min(1000, num_train, num_val)))
    lists = []
    forms = ("train", num_train, "n00000000_{:05d}.JPEG"), ("val", num_val, "ILSVRC2012_val_{:08d}.JPEG")
    for split, count, form in forms:
        labels = np.arange(count) * len(classes) // count
        in_class = np.arange(count) - np.searchsorted(labels, labels)  # position within its class
        files = [form.format(index) for index in range(int(in_class.max()) + 1)]
        for index, file in enumerate(files):
            (photos / file).hardlink_to(photos / f"{index % 16}.jpg")
        (folder / split).mkdir()
        for class_name in classes:
            (folder / split / class_name).symlink_to(photos)
        pairs = zip(labels.tolist(), in_class.tolist(), strict=True)
        names = [f"{split}/{classes[label]}/{files[index]}" for label, index in pairs]
        lists.append(image_list(folder, names, labels, sizes[in_class % 16]))
    write_manifest(Manifest(train=lists[0], val=lists[1], classes=classes, layout="bench loader"), folder)


def first_batch(root: str, num_workers: int) -> tuple[float, int, int]:
    """Open the data set and take a batch of its training loader, in a new process.

    Returns:
        Seconds for both, the import of the decoder included, and the bytes of resident memory
        before and after the batch.
    """
    start = time.perf_counter()
    loader = train_loader(Path(root), 64, num_workers)
    opened = psutil.Process().memory_info().rss
    next(loader.batches())
    return time.perf_counter() - start, opened, psutil.Process().memory_info().rss
