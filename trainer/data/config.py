"""Configure the data set, its loader and its crops."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from bitfleet.trainer.data.fashion import SUBSET_ROOT
from bitfleet.trainer.run.roles import role

_LEAST = {"image_size": 1, "crop_padding": 0, "val_batch_size": 1, "num_threads": 1, "max_bad_samples": 0}
_POSITIVE = ("memory_gib", "stall_seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Data set, loader and crops. The defaults fit the embedded Fashion-MNIST subset."""

    root: str = field(default=SUBSET_ROOT, metadata=role("host"))
    """"fashion-mnist" (embedded subset), "fashion-mnist-full" (Debian's package
    dataset-fashion-mnist), a folder from `bitfleet data prepare`, or a folder with train/<class>/
    and val/<class>/, images at any depth (the ImageNet layout); valid/ and validation/ also mean
    val/."""
    image_size: int = 32
    """Height and width of the network's input, pixels."""
    augmentation: Literal["random_resized_crop", "pad_crop"] = "pad_crop"
    """Training crop. random_resized_crop: 8-100 % of the area, resized (ImageNet); validation
    resizes to 256/224 * image_size and takes the centre. pad_crop: a random window of the padded
    image, nothing is resized (small images); validation takes the centre."""
    preprocessing: Literal["torchvision", "official"] = "torchvision"
    """Windows and resize of random_resized_crop. official: those of the papers' TensorFlow code,
    bicubic without antialiasing, evaluated on the central 224/256 of the short side; on the CPU,
    validation equals TensorFlow's to the bit."""
    crop_padding: int = 4
    """Zero pixels added around a training image before the window is taken; for pad_crop only."""
    flip: bool = True
    """Mirror half of the training images left to right."""
    color_lighting: bool = False
    """Lighting(0.1) of ReActNet's code, as it works: each channel of a training image stays, or is
    one grey level darker. For preprocessing "torchvision"."""
    rand_augment: str | None = None
    """RandAugment of timm after crop and flip, such as rand-m7-mstd0.5-inc1. For loader "torch" and
    preprocessing "torchvision"."""
    mixup: float = 0.0
    """Alpha of timm's mixup: a micro-batch is mixed with itself in reverse order. 0: none. With
    cutmix too, one of them is drawn for each micro-batch. Accuracy in training is then that on the
    image with the larger share."""
    cutmix: float = 0.0
    """Alpha of timm's cutmix: a box of each image is taken from the micro-batch in reverse order.
    0: none."""
    label_smoothing: float = 0.0
    """Share of each training label that is spread over all classes, in [0, 1)."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Mean of R, G, B on the scale 0..255, subtracted from the images (default: ImageNet's)."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Standard deviation of R, G, B on the scale 0..255, a divisor (default: ImageNet's)."""
    val_batch_size: int = field(default=100, metadata=role("execution"))
    """Validation images per batch and rank."""
    device: Literal["auto", "cpu", "gpu"] = field(default="auto", metadata=role("machine"))
    """Device that decodes images. auto: the one that the model runs on."""
    num_threads: int | None = field(default=None, metadata=role("machine"))
    """Decoding threads per rank. None: the cores of the machine divided by its ranks."""
    loader: Literal["dali", "torch", "memory"] = field(default="dali", metadata=role("execution"))
    """Library that reads images. torch: Pillow and torchvision, on the CPU; the same order, windows
    and flips, pixels that differ in the last bits, so a run cannot switch between the two. memory:
    every image is decoded once, at the start, and kept; its bytes equal dali's on a CPU, and a run
    may switch between these two."""
    memory_gib: float = field(default=4.0, metadata=role("machine"))
    """Most GiB that decoded images may take with loader="memory", training and validation together.
    The ranks of a machine share one copy. With pad_crop they lie on the GPU if they take at most a
    quarter of its memory."""
    allow_incomplete: bool = field(default=False, metadata=role("machine"))
    """Accept unprepared class folders in which classes have no validation image, or of which more
    than 1 % is left out (other file types, hidden files, links to nothing); a note at the start
    says so. `bitfleet data prepare` has an option of the same name."""
    on_bad_sample: Literal["fail", "replace"] = field(default="fail", metadata=role("machine"))
    """Action for an image that cannot be read or decoded. fail: the run ends and names it. replace:
    training takes another image, a function of seed, epoch and sample, and validation leaves it
    out; both are counted and logged."""
    max_bad_samples: int = field(default=100, metadata=role("machine"))
    """With on_bad_sample="replace": stop the run when one rank has replaced more than this many
    distinct images."""
    stall_seconds: float = field(default=60.0, metadata=role("machine"))
    """Seconds to wait for a batch. After that, probe its files: stop the run and name any that
    cannot be read; if all can be, wait once more."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        for option in fields(self):
            choices, value = get_args(option.type), getattr(self, option.name)
            if isinstance(option.default, str) and choices and value not in choices:
                raise ValueError(f"data.{option.name}={value!r} must be one of {', '.join(choices)}")
        for name, channels in (("mean", self.mean), ("std", self.std)):
            if len(channels) != 3 or not all(map(math.isfinite, channels)):
                raise ValueError(f"data.{name}={channels} must be three finite numbers, for R, G and B")
        if min(self.std) <= 0:
            raise ValueError(f"data.std={self.std} must be positive")
        for name in _POSITIVE:
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"data.{name}={getattr(self, name)} must be positive and finite")
        if self.preprocessing == "official" and self.augmentation != "random_resized_crop":
            raise ValueError(
                "data.preprocessing='official' crops as for ImageNet and needs "
                f"data.augmentation='random_resized_crop', not {self.augmentation!r}"
            )
        for name in ("mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"data.{name}={getattr(self, name)} must be finite and not negative")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"data.label_smoothing={self.label_smoothing} must be in [0, 1)")
        for name, is_on in (("color_lighting", self.color_lighting), ("rand_augment", self.rand_augment is not None)):
            if is_on and self.preprocessing == "official":
                raise ValueError(
                    f"data.{name} changes bytes and needs data.preprocessing='torchvision': 'official' makes images of "
                    "real numbers"
                )
        if self.rand_augment is not None and self.loader != "torch":
            raise ValueError(
                f"data.rand_augment runs timm's operations on images of Pillow and needs data.loader='torch', not "
                f"{self.loader!r}"
            )
        if self.loader != "dali" and self.device == "gpu":
            raise ValueError(f"data.loader={self.loader!r} decodes on the CPU: use data.device='auto' or 'cpu'")
