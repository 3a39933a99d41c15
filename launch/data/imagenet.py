"""Published sizes of data sets, and the classes of ILSVRC2012, the ImageNet of 1000 classes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Numbers of images of a published data set."""

    name: str
    train: int
    """Training images."""
    val: int
    """Validation images."""
    least_train_per_class: int
    """Training images of its smallest class."""
    val_per_class: int
    """Validation images of every class."""


ILSVRC2012 = Counts(name="ILSVRC2012", train=1_281_167, val=50_000, least_train_per_class=732, val_per_class=50)
CIFAR10 = Counts(name="CIFAR-10", train=50_000, val=10_000, least_train_per_class=5_000, val_per_class=1_000)


def synsets() -> tuple[str, ...]:
    """Return the classes of ILSVRC2012 by label, in alphabetical order: n01440764, ..."""
    from timm.data import ImageNetInfo  # imports all of timm, which workers need not wait for

    return tuple(ImageNetInfo().label_names())
