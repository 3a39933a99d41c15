"""The rules on CIFAR-10, each with its published setting and the best of a small grid.

section    5.2 of arXiv 2104.05124
question   which rule for the binary weights is most accurate after five epochs, and which gets
           there first?
paper      BinaryNet on CIFAR-10, 500 epochs: Bop2ndOrder 91.9 % (91.4 % as coded), Bop 91.3 %
           (arXiv 1906.02107), latent weights 90.9 % (the same)
runs       8 points x 5 seeds = 40, 5 epochs each
command    bitfleet sweep cifar_rules --data.root /data/cifar10

`best` is the best setting of cifar_settings, where that is not the published one.
"""

from bitfleet.configs.sweeps.cifar_settings import EPOCHS, SETTINGS
from bitfleet.configs.sweeps.sweep import Figure, Point, Sweep

BEST: dict[str, str] = {
    "bop2ndorder": "gamma from 3e-3",
    "bop2ndorder as coded": "gamma from 3e-3",
    "bop": "gamma from 3e-3",
}
"""Rule -> its setting in cifar_settings."""


def sweep() -> Sweep:
    """Return the sweep."""
    points = [(rule, "published", SETTINGS[rule]["published"]) for rule in SETTINGS]
    points += [(rule, "best", SETTINGS[rule][name]) for rule, name in BEST.items()]
    return Sweep(
        name="cifar_rules",
        title="CIFAR-10: rules",
        question="Which rule is most accurate after five epochs, and which gets there first?",
        base="cifar_small",
        axes={"rule": tuple(SETTINGS), "setting": ("published", "best")},
        points=tuple(
            Point({"rule": rule, "setting": setting}, ("--epochs", str(EPOCHS), *words))
            for rule, setting, words in points
        ),
        seeds=(0, 1, 2, 3, 4),
        figure=Figure(facets="setting"),
    )
