"""The loaders that `bitfleet bench loader` compares: each an endless stream of shuffled training batches."""

import importlib.util
import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import datasets, io, transforms
from torchvision.transforms import v2

from bitfleet.launch.bench.loader_table import BITFLEET, BITFLEET_SMALL, TIMM, TORCHVISION_UINT8
from bitfleet.trainer.data import DataConfig, TrainLoader, open_dataset
from bitfleet.trainer.data.image_list import ImageList

ORIGINALS, SMALL = "originals", "small"
"""Folders of photos in the scratch folder."""
SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ENDLESS = 1 << 40  # images
_SAMPLER_SECONDS = 0.2


class Settings(NamedTuple):
    """What is the same for all contenders."""

    batch_size: int
    num_workers: int
    """Threads that decode, or worker processes."""


class Contender(NamedTuple):
    """A loader to measure."""

    title: str
    batches: Callable[[], Iterator[object]]
    """Starts it. Deleting the iterator, and gc.collect() before another starts, end its threads and processes."""
    installed: bool = True
    """The library that it needs is there."""


def contenders(scratch: Path, settings: Settings) -> list[Contender]:
    """The lines of the table. Class folders are in `scratch`/ORIGINALS and `scratch`/SMALL; other forms are written there.

    timm's is what its PrefetchLoader is given: images as uint8, normalised later. FFCV's is written by its documentation, but
    has not been run; it reads copies encoded anew at quality 90, which are easier than the originals.
    """
    originals, small = scratch / ORIGINALS, scratch / SMALL
    decoder, decode = _decoder()
    return [
        Contender(BITFLEET, lambda: _bitfleet(originals, settings)),
        Contender("bitfleet, loader=torch", lambda: _bitfleet(originals, settings, loader="torch")),
        Contender("bitfleet, preprocessing=official", lambda: _bitfleet(originals, settings, preprocessing="official")),
        Contender(TORCHVISION_UINT8, lambda: _torchvision_uint8(originals, settings)),
        Contender("torchvision, PIL, float32", lambda: _torchvision_pil(originals, settings)),
        Contender(TIMM, lambda: _timm(originals, settings)),
        Contender("WebDataset, PIL, uint8", lambda: _webdataset(originals, settings), _installed("webdataset")),
        Contender("FFCV, JPEG of quality 90, uint8", lambda: _ffcv(originals, settings), _installed("ffcv")),
        Contender(f"decoding alone, {decoder}", lambda: _decoding(originals, settings, decode)),
        Contender(BITFLEET_SMALL, lambda: _bitfleet(small, settings)),
    ]


def sampler_alone(root: Path, settings: Settings) -> float:
    """CPU milliseconds that bitfleet's loader takes for an image before anything is read: order, windows, flips, paths."""
    requests = _train_loader(root, settings).requests()
    next(requests)
    start, count = time.process_time(), 0
    while time.process_time() - start < _SAMPLER_SECONDS:
        next(requests)
        count += 1
    return (time.process_time() - start) / (count * settings.batch_size) * 1e3


def _train_loader(root: Path, settings: Settings, **options: Any) -> TrainLoader:
    config = DataConfig(
        root=str(root),
        image_size=SIZE,
        augmentation="random_resized_crop",
        device="cpu",
        num_threads=settings.num_workers,
        **options,
    )
    one_rank = {"num_replicas": 1, "rank": 0, "world_size": 1, "local_world_size": 1}
    return TrainLoader(
        open_dataset(config),
        config,
        seed=0,
        global_batch_size=settings.batch_size,
        device=torch.device("cpu"),
        **one_rank,
    )


def _bitfleet(root: Path, settings: Settings, **options: Any) -> Iterator[object]:
    return _train_loader(root, settings, **options).batches()


def _torchvision_uint8(root: Path, settings: Settings) -> Iterator[object]:
    _accept_torchvision_io()
    crop = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    return _shuffled(datasets.ImageFolder(str(root / "train"), crop, loader=_decode_rgb), settings)


def _torchvision_pil(root: Path, settings: Settings) -> Iterator[object]:
    to_float = [transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)]
    crop = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), *to_float])
    return _shuffled(datasets.ImageFolder(str(root / "train"), crop), settings)


def _decode_rgb(path: str) -> torch.Tensor:
    image: torch.Tensor = io.decode_image(io.read_file(path), mode=io.ImageReadMode.RGB)
    return image


def _accept_torchvision_io() -> None:
    # Deprecated since torchvision 0.29, in favour of a library that is not installed with it; still what people use.
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)


def _shuffled(dataset: Dataset[Any], settings: Settings) -> Iterator[object]:
    # One iteration without an end, so that prefetching does not pause between two epochs, which are short here.
    order = RandomSampler(dataset, num_samples=_ENDLESS)  # type: ignore[arg-type]
    return iter(DataLoader(dataset, settings.batch_size, sampler=order, num_workers=settings.num_workers))


def _timm(root: Path, settings: Settings) -> Iterator[object]:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(root), split="train", is_training=True),
        input_size=(3, SIZE, SIZE),
        batch_size=settings.batch_size,
        is_training=True,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=settings.num_workers,
        use_prefetcher=True,
        use_multi_epochs_loader=True,  # prefetching does not pause between two epochs
        device=torch.device("cpu"),
    )
    # Inside of the PrefetchLoader, whose own work is a copy to the device and the normalisation there.
    return itertools.chain.from_iterable(itertools.repeat(loader.loader))


def _webdataset(root: Path, settings: Settings) -> Iterator[object]:
    import webdataset

    folder = root.parent / "shards"
    if not folder.exists():
        images = _images(root)
        folder.mkdir()
        for worker in range(settings.num_workers):  # a shard each: a worker without one would be an error
            with webdataset.TarWriter(f"{folder}/{worker:06d}.tar") as shard:
                for index in range(worker, len(images), settings.num_workers):
                    label = int(images.labels[index])
                    shard.write({"__key__": f"{index:07d}", "jpg": images.read(index), "cls": label})
    to_uint8 = transforms.PILToTensor()
    crop = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), to_uint8])
    shards = webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=100).repeat()
    stream = shards.shuffle(1000).decode("pil").to_tuple("jpg", "cls").map_tuple(crop, int)
    return iter(webdataset.WebLoader(stream, batch_size=settings.batch_size, num_workers=settings.num_workers))


def _ffcv(root: Path, settings: Settings) -> Iterator[object]:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor
    from ffcv.writer import DatasetWriter

    file = root.parent / "photos.beton"
    folder = datasets.ImageFolder(str(root / "train"))
    if not file.exists():
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
        DatasetWriter(str(file), fields, num_workers=settings.num_workers).from_indexed_dataset(folder)
    loader = Loader(
        str(file),
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(len(folder)), 100),  # its threads rest between two epochs, which are short here
        drop_last=True,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _decoding(root: Path, settings: Settings, decode: Callable[[bytes], object]) -> Iterator[object]:
    """Whole images from memory, on threads; a batch is nothing but their number."""
    images = _images(root)
    encoded = itertools.cycle([images.read(index) for index in range(len(images))])
    with ThreadPoolExecutor(settings.num_workers) as pool:
        while True:
            yield sum(1 for _ in pool.map(decode, itertools.islice(encoded, settings.batch_size)))


def _decoder() -> tuple[str, Callable[[bytes], object]]:
    """The name of the thinnest cover of libjpeg-turbo that is installed, and its function."""
    if _installed("simplejpeg"):
        import simplejpeg

        return "simplejpeg", simplejpeg.decode_jpeg
    if _installed("cv2"):
        import cv2

        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        return "cv2", lambda encoded: cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    _accept_torchvision_io()
    rgb = io.ImageReadMode.RGB
    return "torchvision.io", lambda encoded: io.decode_jpeg(
        torch.frombuffer(bytearray(encoded), dtype=torch.uint8), rgb
    )


def _images(root: Path) -> ImageList:
    return open_dataset(DataConfig(root=str(root))).train


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None
