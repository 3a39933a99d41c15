"""gamma, sigma and threshold of Bop2ndOrder, two at a time.

section    5.1.2 and 5.1.3 of arXiv 2104.05124
question   does one hyperparameter make up for another?
paper      varies one at a time (s512_ablation); the pairs are ours, around the same centre, as_coded
runs       3 grids of 5 x 5 that share their middle lines: 61 points x 1 seed = 61
command    bitfleet sweep s513_pairs
           on the paper's network: --config binarynet_cifar10 --epochs 100 --global_batch_size 100 --optim.lr.kind constant
"""

import itertools

from bitfleet.configs.sweeps.s512_ablation import CENTRE, point
from bitfleet.configs.sweeps.sweep import Point, Sweep

PAIRS = (("gamma", "threshold"), ("sigma", "threshold"), ("gamma", "sigma"))


VALUES = {name: tuple(float(f"{start * 10.0**power:.0e}") for power in range(-2, 3)) for name, start in CENTRE.items()}
"""Two powers of ten to either side of the centre."""


def sweep() -> Sweep:
    """Five values of each, two powers of ten to either side. The learning rate is the base's."""
    points: dict[str, Point] = {}
    for first, second in PAIRS:
        for values in itertools.product(VALUES[first], VALUES[second]):
            each = point(CENTRE | dict(zip((first, second), values, strict=True)))
            points[each.slug] = each
    return Sweep(
        name="s513_pairs",
        title="5.1.3 Two hyperparameters at a time",
        question="How does accuracy depend on gamma, sigma and threshold in pairs: does one make up for another?",
        base="fashion_small",
        points=tuple(points.values()),
        seeds=(0,),
    )
