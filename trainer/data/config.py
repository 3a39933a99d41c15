"""What is read, by what, and how it is cropped: the config of trainer/data/."""

import math
from dataclasses import dataclass
from typing import Literal

from bitfleet.trainer.data.fashion import SUBSET_ROOT

_AUGMENTATIONS = ("random_resized_crop", "pad_crop")
_PREPROCESSINGS = ("torchvision", "official")
_DEVICES = ("auto", "cpu", "gpu")
_LOADERS = ("dali", "torch", "memory")
_BAD_SAMPLE_POLICIES = ("fail", "replace")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read and how it is cropped. The defaults fit the embedded Fashion-MNIST subset."""

    root: str = SUBSET_ROOT
    """"fashion-mnist" (embedded subset), "fashion-mnist-full" (Debian's package dataset-fashion-mnist), or a folder
    from `bitfleet data prepare`, or one with train/<class>/ and val/<class>/, images at any depth (the ImageNet
    layout); valid/ and validation/ are val/."""
    image_size: int = 32
    """Height and width of the images that the network gets, in pixels."""
    augmentation: Literal["random_resized_crop", "pad_crop"] = "pad_crop"
    """Training crop. random_resized_crop: 8-100 % of the area, resized (ImageNet); validation then resizes to
    256/224 * image_size and takes the centre. pad_crop: a random window of the padded image, nothing is resized (small
    images); validation takes the centre."""
    preprocessing: Literal["torchvision", "official"] = "torchvision"
    """With random_resized_crop: whose windows and resize. official: those of the paper's TensorFlow code, bicubic without
    antialiasing, evaluated on the central 224/256 of the short side; validation equals TensorFlow's to the bit on the CPU."""
    crop_padding: int = 4
    """Zero pixels around a training image before the window is taken; for pad_crop only."""
    flip: bool = True
    """Mirror half of the training images left to right."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of R, G, B on the scale 0..255, subtracted from the images (default: ImageNet's)."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B on the scale 0..255; the images are divided by it (default: ImageNet's)."""
    val_batch_size: int = 100
    """Validation images in a batch of one rank."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where images are decoded. auto: on the GPU where the model runs, and on the CPU for a model on the CPU."""
    num_threads: int | None = None
    """Threads that decode in one rank. None: the cores of the machine divided by its ranks."""
    loader: Literal["dali", "torch", "memory"] = "dali"
    """What reads the images. torch: Pillow and torchvision, on the CPU; the same order, windows and flips, pixels that differ in
    the last bits, so a run does not change between the two. memory: every image is decoded once, at the start, and kept; the
    bytes are those of dali on a CPU, and a run may change between these two."""
    memory_gib: float = 4.0
    """With loader="memory": the most GiB that the decoded images may take, training and validation together. The ranks of a
    machine share one copy. With pad_crop they lie on the GPU if they take at most a quarter of its memory."""
    allow_incomplete: bool = False
    """With class folders that are not prepared: go on where classes have no validation image, or where more than 1 % beside the
    images is left out (files of other kinds, hidden ones, links to nothing); the start says it. `bitfleet data prepare` has an
    option of the same name."""
    on_bad_sample: Literal["fail", "replace"] = "fail"
    """What happens when an image cannot be read or decoded. fail: the run ends and names it. replace: another image, a function
    of seed, epoch and sample, takes its place in training, and validation leaves it out; both are counted and logged."""
    max_bad_samples: int = 100
    """With on_bad_sample="replace": a rank that meets more different ones ends the run."""
    stall_seconds: float = 60.0
    """Where a batch takes longer to read, a file that the disk does not give is named and ends the run. If all of them can be
    read, it gets as long once more."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("image_size", self.image_size, 1),
            ("crop_padding", self.crop_padding, 0),
            ("val_batch_size", self.val_batch_size, 1),
            ("num_threads", 1 if self.num_threads is None else self.num_threads, 1),
            ("max_bad_samples", self.max_bad_samples, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        for name, choice, choices in (
            ("augmentation", self.augmentation, _AUGMENTATIONS),
            ("preprocessing", self.preprocessing, _PREPROCESSINGS),
            ("device", self.device, _DEVICES),
            ("loader", self.loader, _LOADERS),
            ("on_bad_sample", self.on_bad_sample, _BAD_SAMPLE_POLICIES),
        ):
            if choice not in choices:
                raise ValueError(f"data.{name}={choice!r} must be one of {', '.join(choices)}")
        for name, channels in (("mean", self.mean), ("std", self.std)):
            if len(channels) != 3 or not all(map(math.isfinite, channels)):
                raise ValueError(f"data.{name}={channels} must be three finite numbers, for R, G and B")
        if min(self.std) <= 0:
            raise ValueError(f"data.std={self.std} must be positive")
        if not self.stall_seconds > 0:
            raise ValueError(f"data.stall_seconds={self.stall_seconds} must be positive")
        if self.preprocessing == "official" and self.augmentation != "random_resized_crop":
            raise ValueError(
                f"data.preprocessing='official' is of ImageNet's crops and needs data.augmentation='random_resized_crop', not "
                f"{self.augmentation!r}"
            )
        if not self.memory_gib > 0:
            raise ValueError(f"data.memory_gib={self.memory_gib} must be positive")
        if self.loader != "dali" and self.device == "gpu":
            raise ValueError(f"data.loader={self.loader!r} decodes on the CPU: use data.device='auto' or 'cpu'")
