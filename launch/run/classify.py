"""Classify images and validation sets with a packed network."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from bitfleet.launch.text import percent
from bitfleet.packed.pixels import pixels_of
from bitfleet.packed.program import Array
from bitfleet.packed.runner import PackedNetwork, load

BAR = 30
"""Characters of a bar for 100 %."""


def classify(program: Path, images: Sequence[Path], num_threads: int, top: int) -> Iterator[str]:
    """Yield the most likely classes of each image, a bar each.

    Raises:
        ValueError: the program or an image cannot be read.
    """
    network = load(program)
    preprocessing = network.description["preprocessing"]
    for path in images:
        try:
            with Image.open(path) as image:
                pixels = pixels_of(image, preprocessing)
        except UnidentifiedImageError:
            raise ValueError(f"{path} is not an image") from None
        except OSError as error:
            raise ValueError(f"the image {path} cannot be read: {error.strerror or error}") from None
        except Exception as error:  # broken files raise nearly anything in Pillow
            raise ValueError(f"the image {path} cannot be read: {error or type(error).__name__}") from None
        start = time.perf_counter()
        (logits,) = network(pixels[None], num_threads)
        milliseconds = 1e3 * (time.perf_counter() - start)
        yield f"{path}  ({milliseconds:.2f} ms)\n{bars(logits, network, top)}"


def bars(logits: Array, network: PackedNetwork, top: int) -> str:
    """Return the `top` classes with their softmax, a line each."""
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares, kind="stable")[:top]
    names = [network.description["classes"][label] for label in best]
    width = max(map(len, names))
    return "\n".join(
        f"  {name:<{width}}  {percent(float(share), 1):>7}  {'█' * round(BAR * float(share))}".rstrip()
        for name, share in zip(names, shares[best], strict=True)
    )


def evaluate(program: Path, root: str, num_threads: int, limit: int | None) -> str:
    """Return top-1 and top-5 over the validation set of `root`, and milliseconds per image.

    Raises:
        ValueError: the program or the data cannot be read, or the classes differ.
    """
    import torch

    from bitfleet.trainer.data import DataConfig, ValidationLoader, dali_is_installed, open_dataset

    network = load(program)
    preprocessing, classes = network.description["preprocessing"], network.description["classes"]
    geometry = preprocessing["geometry"]
    config = DataConfig(
        root=root,
        image_size=preprocessing["image_size"],
        augmentation="pad_crop" if geometry == "crop" else "random_resized_crop",
        preprocessing="official" if geometry == "official" else "torchvision",
        device="cpu",
        loader="dali" if dali_is_installed() else "torch",
    )
    dataset = open_dataset(config)
    numbers = [str(label) for label in range(len(dataset.classes))]  # in a program whose export did not see the data
    if classes not in (list(dataset.classes), numbers):
        raise ValueError(f"{root} has {len(dataset.classes)} classes, {program} was trained on {len(classes)} others")
    loader = ValidationLoader(dataset, config, device=torch.device("cpu"), rank=0, world_size=1, local_world_size=1)
    top1 = top5 = count = 0
    seconds = 0.0
    for images, labels in loader:
        pixels, expected = images.numpy(), labels.numpy()
        if limit is not None:
            pixels, expected = pixels[: limit - count], expected[: limit - count]
        start = time.perf_counter()
        logits = network(pixels, num_threads)
        seconds += time.perf_counter() - start
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        top1 += int((best[:, 0] == expected).sum())
        top5 += int((best == expected[:, None]).any(axis=1).sum())
        count += len(expected)
        if count == limit:
            break
    return (
        f"top-1 {top1 / count:.2%}  top-5 {top5 / count:.2%}  {count:,} images  {1e3 * seconds / count:.2f} ms per "
        f"image on {num_threads} thread{'s' * (num_threads > 1)}"
    )
