"""Part "dali" of `bitfleet bench gpu`: DALI's decoding on the GPU against its CPU path: pixels, races, images/s, memory."""

import dataclasses
import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitfleet.launch.bench.clock import seconds_per_call, synchronize
from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.loader_photos import find_photos, write_class_folders
from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, open_dataset
from bitfleet.trainer.data.dataset import Dataset

Decoder = Literal["cpu", "gpu"]
FAR = 8.0
"""Of 255: pixels that differ by more are counted."""
_NEEDED_SECONDS = 10.0
_NUM_PHOTOS = 512
_ONE_RANK: dict[str, Any] = {"rank": 0, "world_size": 1, "local_world_size": 1}


class Transform(NamedTuple):
    """What becomes of a photo."""

    preprocessing: str
    augmentation: str
    image_size: int


TRANSFORMS = (
    Transform("torchvision", "random_resized_crop", 224),
    Transform("official", "random_resized_crop", 224),
    Transform("torchvision", "pad_crop", 224),
)


class PixelDifference(NamedTuple):
    """The same batches decoded by the GPU and by the CPU, on the scale 0..255."""

    num_images: int
    labels_equal: bool
    mean: float
    share_far: float
    """Of the values: those that differ by more than FAR."""
    largest: float


def data_config(root: Path, transform: Transform, decoder: Decoder, batch_size: int) -> DataConfig:
    """The data part of a run that reads `root` with DALI."""
    options: dict[str, Any] = transform._asdict()
    return DataConfig(root=str(root), device=decoder, val_batch_size=batch_size, **options)


def training_batches(
    dataset: Dataset, config: DataConfig, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of one rank on `device`, endlessly."""
    loader = TrainLoader(
        dataset, config, seed=0, global_batch_size=batch_size, num_replicas=1, device=device, **_ONE_RANK
    )
    return loader.batches()


def compare_pixels(
    root: Path, transform: Transform, decoders: tuple[Decoder, Decoder], device: torch.device, *, batch_size: int
) -> PixelDifference:
    """Read two training and two validation batches with each of `decoders`; the training images are also validated.

    Args:
        root: class folders of photos.
        transform: what becomes of a photo.
        decoders: which are compared.
        device: where batches come out.
        batch_size: photos in a batch.
    """
    batches = []
    for decoder in decoders:
        config = data_config(root, transform, decoder, batch_size)
        dataset = open_dataset(config)
        dataset = dataclasses.replace(dataset, val=dataset.train)
        validation = iter(ValidationLoader(dataset, config, device=device, **_ONE_RANK))
        streams = training_batches(dataset, config, batch_size, device), validation
        read = [batch for stream in streams for batch in itertools.islice(stream, 2)]
        batches.append([(images.float().cpu(), labels.cpu()) for images, labels in read])
    pairs = list(zip(*batches, strict=True))
    off = torch.cat([(a[0] - b[0]).abs().reshape(-1) for a, b in pairs])
    return PixelDifference(
        num_images=sum(len(a[1]) for a, _ in pairs),
        labels_equal=all(torch.equal(a[1], b[1]) for a, b in pairs),
        mean=float(off.mean()),
        share_far=float((off > FAR).float().mean()),
        largest=float(off.max()),
    )


def batches_under_load(
    root: Path, transform: Transform, decoder: Decoder, device: torch.device, *, batch_size: int, num_batches: int
) -> int:
    """How many of the same batches have other pixels when the GPU is busy and its memory is reused at once.

    A buffer of DALI that is freed or overwritten before its copy has been read would show here.
    """
    quiet, busy = (
        _checksums(root, transform, decoder, device, batch_size, num_batches, is_busy=is_busy)
        for is_busy in (False, True)
    )
    return int((quiet != busy).any(1).sum())


def _checksums(
    root: Path,
    transform: Transform,
    decoder: Decoder,
    device: torch.device,
    batch_size: int,
    num_batches: int,
    *,
    is_busy: bool,
) -> Tensor:
    """A weighted sum of the pixels of every image, fp64 [num_batches, batch_size], on the CPU."""
    config = data_config(root, transform, decoder, batch_size)
    stream = training_batches(open_dataset(config), config, batch_size, device)
    side, scrap = (4096, 32 << 20) if device.type == "cuda" else (64, 64)
    matrix = torch.randn(side, side, device=device)
    sums = []
    for images, _ in itertools.islice(stream, num_batches):
        place = torch.arange(1, images[0].numel() + 1, device=images.device, dtype=torch.float64)
        sums.append((images.double().reshape(len(images), -1) * place).sum(1))
        del images
        if not is_busy:
            synchronize(device)
            continue
        for _ in range(4):
            matrix @ matrix
            torch.full((scrap,), 7.0, device=device)  # takes and frees what has just been freed
    return torch.stack(sums).cpu()


def measure_dali(session: Session, root: Path | None) -> None:
    """Write down pixels, races, speed and memory of every transform.

    Args:
        session: of the benchmark.
        root: a data set of photos, as ImageNet; made-up photos where it is None.
    """
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        session.add("DALI", skipped="it is not installed here (nvidia-dali-cuda130, nvidia-dali-cuda120)")
        return
    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as name:
        folder = Path(name) / "photos"
        num_photos = 8 if session.tiny else _NUM_PHOTOS
        num_workers = len(os.sched_getaffinity(0))
        photos = write_class_folders(find_photos(str(root) if root else None, num_photos, num_workers), folder)
        session.add("photos", number=len(photos.train), made_up=photos.made_up)
        transforms = [each._replace(image_size=64) for each in TRANSFORMS] if session.tiny else TRANSFORMS
        for measure in (_measure_pixels, _measure_races, _measure_speed):
            for transform in transforms:
                what = f"{transform.preprocessing}, {transform.augmentation}"
                session.attempt(what, measure, session, what, folder, transform, needs_seconds=_NEEDED_SECONDS)


def _measure_pixels(session: Session, what: str, folder: Path, transform: Transform) -> None:
    decoders: tuple[Decoder, Decoder] = ("gpu", "cpu") if session.is_cuda else ("cpu", "cpu")
    difference = compare_pixels(folder, transform, decoders, session.device, batch_size=4 if session.tiny else 64)
    facts = {"preprocessing": transform.preprocessing, "augmentation": transform.augmentation}
    session.add("pixels, GPU against CPU", **facts, **difference._asdict())


def _measure_races(session: Session, what: str, folder: Path, transform: Transform) -> None:
    batch_size, num_batches = (4, 2) if session.tiny else (128, 30)
    decoder: Decoder = "gpu" if session.is_cuda else "cpu"
    sizes = {"batch_size": batch_size, "num_batches": num_batches}
    different = batches_under_load(folder, transform, decoder, session.device, **sizes)
    session.add("races under load", transform=what, **sizes, different_batches=different)


def _measure_speed(session: Session, what: str, folder: Path, transform: Transform) -> None:
    decoders: tuple[Decoder, ...] = ("gpu", "cpu") if session.is_cuda else ("cpu",)
    for decoder in decoders:
        _measure_decoder(session, what, data_config(folder, transform, decoder, batch_size=4))


def _measure_decoder(session: Session, what: str, config: DataConfig) -> None:
    dataset = open_dataset(config)
    batch_size = min(4 if session.tiny else 256, len(dataset.train))
    free = torch.cuda.mem_get_info()[0] if session.is_cuda else 0
    stream = training_batches(dataset, config, batch_size, session.device)
    seconds_per_call(lambda: next(stream), 3, session.device)
    seconds = seconds_per_call(lambda: next(stream), 2 if session.tiny else 12, session.device)
    session.add(
        "speed",
        transform=what,
        decoder=config.device,
        batch_size=batch_size,
        images_per_second=batch_size / seconds,
        gpu_MB_taken=(free - torch.cuda.mem_get_info()[0]) / 1e6 if session.is_cuda else None,
    )
