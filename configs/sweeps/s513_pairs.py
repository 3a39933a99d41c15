"""gamma, sigma and threshold of Bop2ndOrder, two at a time.

section    5.1.2 and 5.1.3 of arXiv 2104.05124
question   does one hyperparameter compensate for another?
paper      varies one at a time (s512_ablation); the pairs are our addition, around the same centre,
           as_coded
runs       3 grids of 5 x 5 that share their middle lines: 61 points x 1 seed = 61
command    bitfleet sweep s513_pairs
           with its network: --config binarynet_cifar10 --epochs 100 --global_batch_size 100
           --optim.lr.kind constant
"""

import itertools

from bitfleet.configs.sweeps.s512_ablation import CENTRE, point
from bitfleet.configs.sweeps.sweep import EACH_POINT, Figure, Point, Sweep

PAIRS = (("gamma", "sigma"), ("gamma", "threshold"), ("sigma", "threshold"))
VALUES = {name: tuple(float(f"{start * 10.0**power:.0e}") for power in range(-2, 3)) for name, start in CENTRE.items()}
"""Two powers of ten to either side of the centre."""


def sweep() -> Sweep:
    """Return the sweep; the learning rate is that of the base."""
    points: dict[str, Point] = {}
    for first, second in PAIRS:
        for values in itertools.product(VALUES[first], VALUES[second]):
            new = point(CENTRE | dict(zip((first, second), values, strict=True)))
            points[new.slug] = new
    return Sweep(
        name="s513_pairs",
        title="5.1.3 Two hyperparameters at a time",
        question="How does accuracy depend on gamma, sigma and threshold in pairs: does one compensate for another?",
        base="fashion_small",
        axes=VALUES,
        points=tuple(points.values()),
        seeds=(0,),
        figure=Figure(facets=EACH_POINT, grids=PAIRS, robustness=tuple(VALUES)),
    )
