"""Predict facts about a run before it starts, and give one line of advice about it."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bitfleet.launch.advise.theory import FlipRule, Snapshot, predict
from bitfleet.launch.data.imagenet import CIFAR10, ILSVRC2012
from bitfleet.models import check_images, create_model
from bitfleet.optim import Schedule, is_binary
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig, TrainLoader, check_classes, normalize, open_dataset

Verdict = Literal["ok", "look", "wrong"]
PUBLISHED = {1000: (ILSVRC2012.train, "ImageNet"), 100: (50_000, "CIFAR-100"), 10: (CIFAR10.train, "CIFAR-10")}
"""Number of classes -> training images, for runs whose data are on another machine."""
FLIP_RULES = ("bop2ndorder", "bop")  # compare r with a threshold: flips on noise are predicted
STEPS = (1, 2, 10, 100, 1000, 10_000)  # predicted besides the middle and the end of the run
NUM_PIXELS = 400_000  # of the images that measure the gradient: 8 of 224 x 224


class Line(NamedTuple):
    """One line of the table."""

    quantity: str
    value: str
    verdict: Verdict
    reason: str


class Gradient(NamedTuple):
    """Root mean square of the gradients of the binary weights, of all and by layer."""

    rms: float
    layers: dict[str, float]
    origin: str


def measure_gradient(config: TrainConfig) -> Gradient | None:
    """Measure the gradients on the CPU, scaled as noise to the batch; None without binary weights.

    The images are the run's first ones if its data are on this machine, else random pixels.

    Raises:
        ValueError: the network cannot train on images of that size, or of these classes.
    """
    check_images(config.model, config.data.image_size, 2)
    torch.manual_seed(config.seed)
    model = create_model(config.model)
    params = {name: param for name, param in model.named_parameters() if is_binary(param)}
    if not params:
        return None
    num_images = max(2, min(config.global_batch_size, NUM_PIXELS // config.data.image_size**2))
    images, labels, origin = _batch(config, num_images)
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), list(params.values()))
    scale = (num_images / config.global_batch_size) ** 0.5  # noise falls with the root of the batch
    layers = {name: scale * grad.square().mean().sqrt().item() for name, grad in zip(params, grads, strict=True)}
    rms = scale * torch.cat([grad.flatten() for grad in grads]).square().mean().sqrt().item()
    return Gradient(rms, layers, f"one backward pass on {num_images} {origin}, scaled as noise to the batch")


def _batch(config: TrainConfig, num_images: int) -> tuple[Tensor, Tensor, str]:
    data = dataclasses.replace(config.data, loader="torch", device="cpu")
    try:
        dataset = open_dataset(data)
    except ValueError:
        labels = torch.randint(config.model.num_classes, (num_images,))
        return torch.randn(num_images, 3, data.image_size, data.image_size), labels, "images of random pixels"
    check_classes(dataset, config.model.num_classes, data.root)
    alone = {"num_replicas": 1, "rank": 0, "world_size": 1, "local_world_size": 1}
    device = torch.device("cpu")
    loader = TrainLoader(dataset, data, seed=config.seed, global_batch_size=num_images, device=device, **alone)
    images, labels = next(loader.batches(0))
    return normalize(images, data.mean, data.std), labels, f"images of {data.root}"


def count_images(data: DataConfig, num_classes: int) -> tuple[int, str]:
    """Return the number of training images, and its origin in words.

    Raises:
        ValueError: the data are not on this machine, and no known set has this number of classes.
    """
    try:
        return len(open_dataset(data).train), f"in {data.root}"
    except ValueError as error:
        if num_classes not in PUBLISHED:
            raise ValueError(f"how many training images are there? Pass --images N, as {error}") from error
        return PUBLISHED[num_classes][0], f"as in {PUBLISHED[num_classes][1]}; {data.root} is not on this machine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlook:
    """A run before it starts."""

    config: TrainConfig
    num_images: int
    images_from: str = "given"
    more_steps: tuple[int, ...] = ()
    """1-based steps to predict besides the usual ones."""
    gradient: Gradient | None = None

    def __post_init__(self) -> None:
        if self.num_images < self.config.global_batch_size:
            size = f"--global_batch_size is {self.config.global_batch_size}"
            raise ValueError(f"{size}, more than the {self.num_images:,} training images: lower it")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.config.global_batch_size

    @property
    def num_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def decay_steps(self) -> int:
        """Length of the schedules that do not state theirs."""
        return self.config.epochs * self.num_images // self.config.global_batch_size

    @property
    def middle(self) -> int:
        return max(1, self.num_steps // 2)

    @property
    def points(self) -> dict[int, str]:
        """Three steps and their names, in ascending order; a short run has fewer."""
        start = min(100, max(1, self.num_steps // 4))
        return dict(sorted({self.num_steps: "end", self.middle: "middle", start: "start"}.items()))

    @property
    def driven(self) -> str | None:
        """The hyperparameter that a controller drives, if any."""
        drives = self.config.optim.transitions.drives
        return None if drives == "off" else drives

    def schedule(self, name: str) -> Schedule:
        """Return the schedule of a hyperparameter, its length filled in."""
        schedule = getattr(self.config.optim, name)
        assert isinstance(schedule, Schedule), name
        return self.lasting(schedule)

    def lasting(self, schedule: Schedule) -> Schedule:
        """Return `schedule` with its length filled in."""
        return schedule.over(self.decay_steps, num_epochs=self.config.epochs, steps_per_epoch=self.steps_per_epoch)

    @functools.cached_property
    def rule(self) -> FlipRule | None:
        """The rule with its schedules, if flips on noise are predicted for it."""
        optim = self.config.optim
        if optim.rule not in FLIP_RULES:
            return None
        sigma = self.schedule("sigma") if optim.sigma is not None else None
        gamma, threshold = self.schedule("gamma"), self.schedule("threshold")
        return FlipRule(gamma=gamma, threshold=threshold, sigma=sigma, correction=optim.correction)

    @functools.cached_property
    def snapshots(self) -> dict[int, Snapshot]:
        """Step -> prediction, in ascending order; empty if there is none."""
        if self.rule is None:
            return {}
        steps = (*self.more_steps, *STEPS, *self.points)
        return predict(self.rule, self.num_steps, steps, gradient=self.gradient.rms if self.gradient else 1.0)
