"""Three rules on CIFAR-10 in fp32 and in bf16.

section    none
question   are accuracies and the order of three rules the same in bf16 as in fp32?
paper      float32 throughout
runs       2 precisions x 3 rules x 3 seeds = 18, 2 epochs each
command    bitfleet sweep cifar_precision --data.root /data/cifar10
"""

import itertools

from bitfleet.configs.sweeps.cifar_settings import SETTINGS
from bitfleet.configs.sweeps.sweep import TABLE, Point, Sweep

PRECISIONS, RULES = ("fp32", "bf16"), ("bop2ndorder", "latent_adam", "two_ema")


def sweep() -> Sweep:
    """Return the sweep: published settings."""
    return Sweep(
        name="cifar_precision",
        title="CIFAR-10: precision",
        question="Are accuracies and the order of three rules the same in bf16 as in fp32?",
        base="cifar_small",
        axes={"precision": PRECISIONS, "rule": RULES},
        points=tuple(
            Point(
                {"precision": precision, "rule": rule},
                ("--epochs", "2", "--engine.precision", precision, *SETTINGS[rule]["published"]),
            )
            for precision, rule in itertools.product(PRECISIONS, RULES)
        ),
        figure=TABLE,
    )
