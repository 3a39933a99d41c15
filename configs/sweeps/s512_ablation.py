"""gamma, sigma and threshold of Bop2ndOrder, one at a time.

section    5.1.2 and 5.1.3 of arXiv 2104.05124
question   how far can each hyperparameter be from its best value?
paper      BinaryNet with BatchNorm on CIFAR-10, unbiased (as_coded), 100 epochs in batches of 100,
           one hyperparameter varied around gamma 1e-7, sigma 1e-3, threshold 1e-6. Its ranges are
           not published: here steps of 100, four powers of ten to either side (sigma ends at 1,
           which does not average).
runs       (5 + 4 + 4) points x 3 seeds = 39
command    bitfleet sweep s512_ablation
           as in the paper: --config binarynet_cifar10 --epochs 100 --global_batch_size 100
           --optim.lr.kind constant
"""

from bitfleet.configs.sweeps.sweep import EACH_AXIS, Figure, Point, Sweep, constants

CENTRE = {"gamma": 1e-7, "sigma": 1e-3, "threshold": 1e-6}
VALUES = {
    "gamma": (1e-11, 1e-9, 1e-7, 1e-5, 1e-3),
    "sigma": (1e-7, 1e-5, 1e-3, 1e-1, 1.0),
    "threshold": (1e-10, 1e-8, 1e-6, 1e-4, 1e-2),
}
RULE = ("--optim.rule", "bop2ndorder", "--optim.correction", "as_coded")


def point(values: dict[str, float]) -> Point:
    """Return the point with all three constant at `values`."""
    return Point(dict(values), (*RULE, *(word for name, value in values.items() for word in constants(name, value))))


def sweep() -> Sweep:
    """Return the sweep; the learning rate is that of the base."""
    lines = [
        point(CENTRE | {name: value}) for name, values in VALUES.items() for value in values if value != CENTRE[name]
    ]
    return Sweep(
        name="s512_ablation",
        title="5.1.2 One hyperparameter at a time",
        question="How does accuracy depend on gamma, on sigma and on the threshold, each varied alone?",
        base="fashion_small",
        axes=VALUES,
        points=(point(CENTRE), *lines),
        figure=Figure(facets=EACH_AXIS, centre=CENTRE, robustness=tuple(CENTRE)),
    )
