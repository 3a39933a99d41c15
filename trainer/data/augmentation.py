"""Change training images after their crop: colour lighting, and timm's RandAugment, mixup and
cutmix.

All random numbers are functions of (seed, epoch, sample), as in sampler.py: any number of ranks
gives the same images. timm draws from the global generators of Python and numpy; here it runs in
copies of its modules that have their own, seeded before each call. RandAugment's key is its image,
that of mixup and cutmix the first image of the micro-batch. (Their generators take logarithms from
the C library: the last bits may differ between machines with different ones.)
"""

import dataclasses
import importlib.util
import random
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bitfleet.trainer.data import sampler
from bitfleet.trainer.data.config import DataConfig
from bitfleet.trainer.data.request import Batch

_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
"""Principal components of the colours of ImageNet; a row per channel R, G, B."""
_DIRECTION_ATTEMPTS = 24
"""A point of a cube lies in its ball with probability 0.52: all fail once in 4e7 images."""


def lighting_shifts(directions: sampler.Floats) -> npt.NDArray[np.uint8]:
    """Return what ReActNet's Lighting(0.1) subtracts from each channel, 0 or 1, uint8 [N, 3].

    Its eigenvalues are for images in [0, 1], but are added to grey levels 0..255: the sum of 0.1 *
    normal numbers * eigenvalues * eigenvectors stays far below one level, and is truncated. A
    negative sum takes one level away, a positive one does nothing.

    Args:
        directions: the normal numbers, up to a positive factor for each image, float64 [N, 3].
    """
    scaled = [directions[:, index] * value for index, value in enumerate(_EIGENVALUES)]
    # Sums in one order, not by BLAS: the same bits on every machine.
    sums = [scaled[0] * row[0] + scaled[1] * row[1] + scaled[2] * row[2] for row in _EIGENVECTORS]
    return (np.stack(sums, axis=1) < 0).astype(np.uint8)


def random_directions(seed: int, epoch: int, samples: sampler.Ints) -> sampler.Floats:
    """Return vectors with the directions of three normal numbers, float64 [N, 3]: uniform points of
    a ball."""
    draws = sampler.uniforms(seed, epoch, sampler.LIGHTING, samples, 3 * _DIRECTION_ATTEMPTS)
    points = 2.0 * draws.reshape(len(samples), _DIRECTION_ATTEMPTS, 3) - 1.0
    squares = points[..., 0] ** 2 + points[..., 1] ** 2 + points[..., 2] ** 2
    attempt = ((squares <= 1.0) & (squares > 0.0)).argmax(axis=1)
    directions: sampler.Floats = points[np.arange(len(samples)), attempt]
    return directions


class _Numpy:
    """numpy with a generator of its own, as a module of timm sees it."""

    def __init__(self) -> None:
        self.random = np.random.RandomState(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _private_copy(name: str) -> ModuleType:
    """Return a copy of the module `name` whose `random` and `np.random` nobody else draws from."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.random = random.Random(0)  # type: ignore[attr-defined]
    module.np = _Numpy()  # type: ignore[attr-defined]
    return module


def _seed(module: ModuleType, key: int) -> None:
    module.random.seed(key)
    module.np.random.seed([key & 0xFFFFFFFF, key >> 32])


class RandAugment:
    """timm's RandAugment, with numbers that belong to the image; threads may share it.

    Args:
        config: of timm, such as rand-m7-mstd0.5-inc1.
        image_size: height and width of the images.
        mean: colour that fills what an operation leaves empty, R, G, B on the scale 0..255.
        seed: of the run.

    Raises:
        ValueError: timm does not know the config.
    """

    def __init__(self, config: str, *, image_size: int, mean: tuple[float, float, float], seed: int) -> None:
        # As timm's create_transform.
        fill = tuple(min(255, round(value)) for value in mean)
        self._config, self._options = config, {"translate_const": int(image_size * 0.45), "img_mean": fill}
        self._seed, self._of_thread = seed, threading.local()
        try:
            self._mine()
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"data.rand_augment={config!r} is not a RandAugment of timm ({error}): expected a string such as "
                "rand-m7-mstd0.5-inc1"
            ) from error

    def _mine(self) -> tuple[ModuleType, Callable[[Image.Image], Image.Image]]:
        if not hasattr(self._of_thread, "copy"):
            module = _private_copy("timm.data.auto_augment")
            self._of_thread.copy = module, module.rand_augment_transform(self._config, dict(self._options))
        copy: tuple[ModuleType, Callable[[Image.Image], Image.Image]] = self._of_thread.copy
        return copy

    def __call__(self, image: Image.Image, epoch: int, sample: int) -> Image.Image:
        """Return the image, mode RGB and of the same size, as augmented in an epoch."""
        module, augment = self._mine()
        _seed(module, int(sampler.keys(self._seed, epoch, sampler.RAND_AUGMENT, np.array([sample]))[0]))
        return augment(image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchAugmentation:
    """Augment whole micro-batches on the device of the model."""

    lighting: bool
    mixup: float
    """Alpha of mixup; 0: none."""
    cutmix: float
    """Alpha of cutmix; 0: none."""
    num_classes: int
    seed: int
    _mixing: ModuleType | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.mixup or self.cutmix:
            object.__setattr__(self, "_mixing", _private_copy("timm.data.mixup"))

    def __call__(self, batch: Batch, epoch: int, samples: sampler.Ints) -> Batch:
        """Return the micro-batch after lighting and mixing.

        Args:
            batch: images, uint8 or float32 [N, H, W, 3] on the scale 0..255; labels, int64 [N].
            epoch: of the samples.
            samples: of the stream, [N]; bad ones may have been replaced by others in `batch`.

        Returns:
            Images; mixed ones are float32 on the same scale. Labels, those of mixed images float32
            [N, classes], with the share of each class.
        """
        images, labels = batch
        if self.lighting:
            shifts = lighting_shifts(random_directions(self.seed, epoch, samples))
            images = darker(images, torch.from_numpy(shifts))
        return (images, labels) if self._mixing is None else self._mixed(images, labels, epoch, samples)

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, samples: sampler.Ints) -> Batch:
        """Mix image i with image N - 1 - i, by one share for the micro-batch (timm's mode
        "batch")."""
        module = self._mixing
        assert module is not None
        _seed(module, int(sampler.keys(self.seed, epoch, sampler.MIX, samples[:1])[0]))
        mix = module.Mixup(self.mixup, self.cutmix, label_smoothing=0.0, num_classes=self.num_classes)
        images = images.to(torch.float32, copy=True)
        _, shares = mix(images.permute(0, 3, 1, 2), labels)
        return images, shares


def darker(images: Tensor, shifts: Tensor) -> Tensor:
    """Return `images` minus `shifts`, not below 0.

    Args:
        images: uint8 [N, H, W, 3].
        shifts: uint8 [N, 3], on the CPU.
    """
    if images.is_cuda:
        shifts = shifts.pin_memory().to(images.device, non_blocking=True)
    return images - torch.minimum(images, shifts[:, None, None, :])


def batch_augmentation(config: DataConfig, *, num_classes: int, seed: int) -> BatchAugmentation | None:
    """Return what `config` does to whole micro-batches; None for nothing."""
    if not (config.color_lighting or config.mixup or config.cutmix):
        return None
    return BatchAugmentation(
        lighting=config.color_lighting, mixup=config.mixup, cutmix=config.cutmix, num_classes=num_classes, seed=seed
    )


def rand_augment(config: DataConfig, *, seed: int) -> RandAugment | None:
    """Return the RandAugment of `config`; None for none.

    Raises:
        ValueError: timm does not know it.
    """
    if config.rand_augment is None:
        return None
    return RandAugment(config.rand_augment, image_size=config.image_size, mean=config.mean, seed=seed)
