"""The rules on CIFAR-10 over runs of 2 to 40 epochs.

section    none: what a short run can say about the 500 epochs of 5.2 of arXiv 2104.05124
question   from which number of epochs on is the order of the rules that of longer runs?
paper      BinaryNet on CIFAR-10, 500 epochs: Bop2ndOrder 91.9 % (91.4 % as coded), Bop 91.3 %
           (arXiv 1906.02107), latent weights 90.9 % (the same)
runs       5 lengths x 5 rules x 1 seed = 25, shortest first
command    bitfleet sweep cifar_length --data.root /data/cifar10
"""

import itertools

from bitfleet.configs.sweeps.cifar_settings import SETTINGS
from bitfleet.configs.sweeps.sweep import Figure, Point, Sweep

EPOCHS = (2, 5, 10, 20, 40)


def sweep() -> Sweep:
    """Return the sweep: published settings, whose schedules keep their shape over any length."""
    return Sweep(
        name="cifar_length",
        title="CIFAR-10: length of a run",
        question="From which number of epochs on is the order of the rules that of longer runs?",
        base="cifar_small",
        axes={"epochs": EPOCHS, "rule": tuple(SETTINGS)},
        points=tuple(
            Point({"epochs": epochs, "rule": rule}, ("--epochs", str(epochs), *SETTINGS[rule]["published"]))
            for epochs, rule in itertools.product(EPOCHS, SETTINGS)
        ),
        seeds=(0,),
        figure=Figure(facets="rule", grids=(("epochs", "rule"),)),
    )
