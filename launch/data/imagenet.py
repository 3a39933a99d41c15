"""What ILSVRC2012, the ImageNet of 1000 classes, consists of."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Images of a data set that is known."""

    train: int
    """Training images."""
    val: int
    """Validation images."""
    least_train_per_class: int
    """Training images of its smallest class."""
    val_per_class: int
    """Validation images of every class."""


ILSVRC2012 = Counts(train=1_281_167, val=50_000, least_train_per_class=732, val_per_class=50)
CIFAR10 = Counts(train=50_000, val=10_000, least_train_per_class=5_000, val_per_class=1_000)


def synsets() -> tuple[str, ...]:
    """The classes of ILSVRC2012 in the order of their labels, which is the alphabetical one: n01440764, ..."""
    from timm.data import ImageNetInfo  # brings in all of timm, which the workers need not wait for

    return tuple(ImageNetInfo().label_names())
