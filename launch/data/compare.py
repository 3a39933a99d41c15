"""Compare the two loaders, DALI and torchvision, image by image: `bitfleet data compare`."""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch

from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.dataset import Dataset, open_dataset
from bitfleet.trainer.data.loaders import TrainLoader, ValidationLoader
from bitfleet.trainer.data.request import Batch

_BATCH = 32
# Mean |difference| of an image, of 255: rounding gives 0.1 to 0.3, another orientation or colour
# space 20.
_TOLERANCE = 2.0
_ONE_RANK = {"rank": 0, "world_size": 1, "local_world_size": 1}


class _Difference(NamedTuple):
    """Difference between the pixels of one image, on the scale 0..255."""

    path: str
    mean: float
    largest: float
    same_label: bool


def compare(config: DataConfig, *, num_images: int, seed: int, device: torch.device) -> tuple[str, int]:
    """Read the first training and validation images with both loaders.

    Args:
        config: Data config of the run, whose loader, RandAugment and mixing do not matter.
        num_images: Images per split.
        seed: Seed of the stream.
        device: Device of the run; on a GPU, DALI decodes there by the rules of data.device.

    Returns:
        A report, and the number of images that differ by more than rounding or in their label.

    Raises:
        ValueError: The data cannot be opened, or an image cannot be read.
    """
    dataset = open_dataset(config)
    lines = [f"{'':10} {'images':>7} {'mean |d|':>9} {'worst image':>12} {'largest |d|':>12}   of 255"]
    different: list[_Difference] = []
    for split in ("training", "validation"):
        images = list(islice(_differences(dataset, config, split, seed, device), num_images))
        mean = sum(image.mean for image in images) / len(images)
        worst, largest = max(image.mean for image in images), max(image.largest for image in images)
        lines.append(f"{split:10} {len(images):7,} {mean:9.3f} {worst:12.3f} {largest:12.0f}")
        different += [image for image in images if image.mean > _TOLERANCE or not image.same_label]
    for image in sorted(different, key=lambda image: -image.mean)[:10]:
        label = "" if image.same_label else ", another label"
        lines.append(f"differs: {image.path}: mean |d| {image.mean:.1f}, largest {image.largest:.0f}{label}")
    lines.append(
        f"{len(different)} of these images differ by more than rounding (mean |d| > {_TOLERANCE:g})"
        if different
        else "every image is the same but for rounding, and has the same label, window and place"
    )
    return "\n".join(lines), len(different)


def _differences(
    dataset: Dataset, config: DataConfig, split: str, seed: int, device: torch.device
) -> Iterator[_Difference]:
    strict = dataclasses.replace(
        config, val_batch_size=_BATCH, on_bad_sample="fail", rand_augment=None, mixup=0.0, cutmix=0.0
    )
    # torch decodes on the CPU
    configs = [dataclasses.replace(strict, loader="dali"), dataclasses.replace(strict, loader="torch", device="auto")]
    paths: Iterator[str]
    streams: list[Iterable[Batch]]
    if split == "validation":
        paths = map(dataset.val.path, range(len(dataset.val)))
        streams = [ValidationLoader(dataset, one, device=device, **_ONE_RANK) for one in configs]
    else:
        batch = min(_BATCH, len(dataset.train))
        loaders = [
            TrainLoader(dataset, one, seed=seed, global_batch_size=batch, num_replicas=1, device=device, **_ONE_RANK)
            for one in configs
        ]
        paths = (request.path(k) for request in loaders[0].requests() for k in range(batch))
        streams = [loader.batches() for loader in loaders]
    for (images, labels), (other_images, other_labels) in zip(*streams, strict=True):
        difference = (images.to(torch.float32) - other_images.to(torch.float32)).abs().cpu()
        for k in range(len(labels)):
            yield _Difference(
                path=next(paths),
                mean=float(difference[k].mean()),
                largest=float(difference[k].max()),
                same_label=bool(labels[k] == other_labels[k]),
            )
