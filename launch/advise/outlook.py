"""What is known of a run before it is made, and a line of what is said about it."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Literal, NamedTuple

from bitfleet.launch.advise.gradient import Gradient
from bitfleet.launch.advise.theory import FlipRule, Snapshot, simulate
from bitfleet.launch.data.imagenet import ILSVRC2012
from bitfleet.optim import Schedule
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig, open_dataset

Verdict = Literal["ok", "look", "wrong"]
PUBLISHED_IMAGES = {1000: (ILSVRC2012.train, "ImageNet"), 100: (50_000, "CIFAR-100"), 10: (50_000, "CIFAR-10")}
"""Number of classes -> training images, for runs whose data are elsewhere."""
PREDICTED = ("bop2ndorder", "bop")
"""Rules whose flips on noise are predicted."""
LOOKS = (1, 2, 10, 100, 1000, 10_000)
"""Steps whose flip ratio is predicted, beside the middle of the run and its end."""


class Line(NamedTuple):
    """One line of the table."""

    quantity: str
    value: str
    verdict: Verdict
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlook:
    """A run as far as it is known before it is made."""

    config: TrainConfig
    num_images: int
    """Training images."""
    gradient: Gradient | None = None
    """None: not measured."""
    more_steps: tuple[int, ...] = ()
    """Steps that are looked at beside the usual ones."""

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Whole batches."""
        return self.num_images // self.config.global_batch_size

    @functools.cached_property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.config.epochs * self.steps_per_epoch

    @functools.cached_property
    def decay_steps(self) -> int:
        """Length of the schedules that state none."""
        return self.config.epochs * self.num_images // self.config.global_batch_size

    @property
    def predicts_flips(self) -> bool:
        """Whether the rule is one whose flips on noise are predicted."""
        return self.config.optim.rule in PREDICTED

    @property
    def is_seeded(self) -> bool:
        """Whether the run begins from weights with a state that keeps them."""
        return self.config.init is not None and self.config.optim.init_inertia > 0

    @property
    def driven(self) -> str | None:
        """The hyperparameter that a controller drives; None where none does."""
        drives = self.config.optim.transitions.drives
        return None if drives == "off" else drives

    def schedule(self, name: str) -> Schedule:
        """The schedule of the hyperparameter `name`, which the rule has, its length filled in."""
        found = getattr(self.config.optim, name)
        assert isinstance(found, Schedule), name
        return found.over(self.decay_steps)

    @functools.cached_property
    def rule(self) -> FlipRule:
        """The rule, if it is one that compares a ratio with a threshold."""
        optim = self.config.optim
        assert self.predicts_flips, optim.rule
        return FlipRule(
            gamma=self.schedule("gamma"),
            threshold=self.schedule("threshold"),
            sigma=self.schedule("sigma") if optim.sigma is not None else None,
            correction=optim.correction,
        )

    @functools.cached_property
    def snapshots(self) -> dict[int, Snapshot]:
        """Step -> the simulated weights there."""
        steps = {*self.more_steps, *LOOKS, self.start, self.middle, self.num_steps}
        inside = [step for step in steps if 1 <= step <= self.num_steps]
        gradient = self.gradient.rms if self.gradient else 1.0
        return {found.step: found for found in simulate(self.rule, self.num_steps, inside, gradient=gradient)}

    @property
    def start(self) -> int:
        """A step near the start of the run, after the first few."""
        return min(100, max(1, self.num_steps // 4))

    @property
    def middle(self) -> int:
        """The step in the middle of the run."""
        return max(1, self.num_steps // 2)


def make_outlook(
    config: TrainConfig, num_images: int, gradient: Gradient | None = None, more_steps: Collection[int] = ()
) -> Outlook:
    """What is known of a run of `config` on `num_images` training images.

    Raises:
        ValueError: a batch is larger than the training set.
    """
    if num_images < config.global_batch_size:
        raise ValueError(
            f"global_batch_size is {config.global_batch_size}, more than the {num_images:,} training images: "
            "lower --global_batch_size"
        )
    return Outlook(config=config, num_images=num_images, gradient=gradient, more_steps=tuple(more_steps))


def count_images(data: DataConfig, num_classes: int) -> tuple[int, str]:
    """Training images of a run, and in words where the number is from.

    Raises:
        ValueError: the data are not on this machine and their number of classes is of no data set that is known.
    """
    try:
        return len(open_dataset(data).train), f"in {data.root}"
    except ValueError as error:
        if num_classes not in PUBLISHED_IMAGES:
            raise ValueError(f"how many training images are there? Pass --images N, as {error}") from error
        number, name = PUBLISHED_IMAGES[num_classes]
        return number, f"of {name}, as {data.root} is not here"
