"""Part "dali" of `bitfleet bench gpu`: DALI's decoding on the GPU against its CPU path."""

import dataclasses
import importlib.util
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bitfleet.launch.bench.gpu.session import Session
from bitfleet.launch.bench.photos import find_photos, write_class_folders
from bitfleet.launch.bench.timing import seconds_per_call, synchronize
from bitfleet.launch.job import num_cores
from bitfleet.trainer.data import DataConfig, TrainLoader, ValidationLoader, open_dataset
from bitfleet.trainer.data.dataset import Dataset

Decoder = Literal["cpu", "gpu"]
FAR = 8.0
_ONE_RANK: dict[str, Any] = {"rank": 0, "world_size": 1, "local_world_size": 1}


class Transform(NamedTuple):
    """Options that turn a photo into pixels."""

    preprocessing: str
    augmentation: str
    image_size: int


TRANSFORMS = (
    Transform("torchvision", "random_resized_crop", 224),
    Transform("official", "random_resized_crop", 224),
    Transform("torchvision", "pad_crop", 224),
)


def _config(root: Path, transform: Transform, decoder: Decoder, batch_size: int) -> DataConfig:
    options: dict[str, Any] = transform._asdict()
    return DataConfig(root=str(root), device=decoder, val_batch_size=batch_size, **options)


def _batches(
    dataset: Dataset, config: DataConfig, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    options = {"global_batch_size": batch_size, "num_replicas": 1, **_ONE_RANK}
    return TrainLoader(dataset, config, seed=0, device=device, **options).batches()


def compare_pixels(
    root: Path, transform: Transform, decoders: tuple[Decoder, Decoder], device: torch.device, *, batch_size: int
) -> dict[str, float]:
    """Read two training and two validation batches of the folder `root` with each decoder.

    Returns:
        num_images; labels_equal; and of the differences of pixels (0 to 255) the mean, share_far
        above FAR, and the largest.
    """
    batches = []
    for decoder in decoders:
        config = _config(root, transform, decoder, batch_size)
        dataset = open_dataset(config)
        dataset = dataclasses.replace(dataset, val=dataset.train)
        validation = iter(ValidationLoader(dataset, config, device=device, **_ONE_RANK))
        streams = _batches(dataset, config, batch_size, device), validation
        read = [batch for stream in streams for batch in itertools.islice(stream, 2)]
        batches.append([(images.float().cpu(), labels.cpu()) for images, labels in read])
    pairs = list(zip(*batches, strict=True))
    difference = torch.cat([(a[0] - b[0]).abs().reshape(-1) for a, b in pairs])
    return {
        "num_images": sum(len(a[1]) for a, _ in pairs),
        "labels_equal": all(torch.equal(a[1], b[1]) for a, b in pairs),
        "mean": float(difference.mean()),
        "share_far": float((difference > FAR).float().mean()),
        "largest": float(difference.max()),
    }


def batches_under_load(
    root: Path, transform: Transform, decoder: Decoder, device: torch.device, *, batch_size: int, num_batches: int
) -> int:
    """Count batches with other pixels when the GPU is busy and its memory is reused at once.

    A buffer of DALI that is freed or overwritten before its copy has been read would show here.
    """
    config = _config(root, transform, decoder, batch_size)
    quiet, busy = (_checksums(config, device, batch_size, num_batches, is_busy=is_busy) for is_busy in (False, True))
    return int((quiet != busy).any(1).sum())


def _checksums(config: DataConfig, device: torch.device, batch_size: int, num_batches: int, *, is_busy: bool) -> Tensor:
    """A weighted sum of the pixels of every image, fp64 [num_batches, batch_size], on the CPU."""
    stream = _batches(open_dataset(config), config, batch_size, device)
    side, scrap = (4096, 32 << 20) if device.type == "cuda" else (64, 64)
    matrix = torch.randn(side, side, device=device)
    sums = []
    for images, _ in itertools.islice(stream, num_batches):
        weights = torch.arange(1, images[0].numel() + 1, device=images.device, dtype=torch.float64)
        sums.append((images.double().reshape(len(images), -1) * weights).sum(1))
        del images
        if not is_busy:
            synchronize(device)
            continue
        for _ in range(4):
            matrix @ matrix
            torch.full((scrap,), 7.0, device=device)  # takes and frees what has just been freed
    return torch.stack(sums).cpu()


def measure_dali(session: Session) -> None:
    """Write down pixels, races, speed and memory of every transform."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        session.add("DALI", skipped="it is not installed here (nvidia-dali-cuda130, nvidia-dali-cuda120)")
        return
    decoders: tuple[Decoder, Decoder] = ("gpu" if session.is_cuda else "cpu", "cpu")

    def pixels(what: str, transform: Transform) -> None:
        difference = compare_pixels(folder, transform, decoders, session.device, batch_size=4 if session.tiny else 64)
        names = {"preprocessing": transform.preprocessing, "augmentation": transform.augmentation}
        session.add("pixels, GPU against CPU", **names, **difference)

    def races(what: str, transform: Transform) -> None:
        sizes = dict(zip(("batch_size", "num_batches"), (4, 2) if session.tiny else (128, 30), strict=True))
        different = batches_under_load(folder, transform, decoders[0], session.device, **sizes)
        session.add("races under load", transform=what, **sizes, different_batches=different)

    def speed(what: str, transform: Transform) -> None:
        for decoder in dict.fromkeys(decoders):
            _measure_speed(session, what, _config(folder, transform, decoder, batch_size=4))

    with tempfile.TemporaryDirectory(prefix="bitfleet-bench-gpu-") as name:
        folder = Path(name) / "photos"
        photos = write_class_folders(find_photos(session.imagenet, 8 if session.tiny else 512, num_cores()), folder)
        session.add("photos", number=len(photos.train), synthetic=photos.synthetic)
        for measure in (pixels, races, speed):
            for transform in TRANSFORMS:
                sized = transform._replace(image_size=64) if session.tiny else transform
                what = f"{transform.preprocessing}, {transform.augmentation}"
                session.attempt(what, measure, what, sized, needs_seconds=10.0)


def _measure_speed(session: Session, what: str, config: DataConfig) -> None:
    dataset = open_dataset(config)
    batch_size = min(4 if session.tiny else 256, len(dataset.train))
    free = torch.cuda.mem_get_info()[0] if session.is_cuda else 0
    stream = _batches(dataset, config, batch_size, session.device)
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
