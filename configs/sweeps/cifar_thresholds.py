"""Thresholds that hold weights back, with the second moment and without.

section    none: regime shows that the published thresholds hold no weight, and that 0.1 helps
question   how high should the threshold be, at which gamma, and does it need the second moment?
paper      thresholds of 1e-8 to 1e-5; noise alone gives a ratio of about sqrt(gamma / 2), 0.07 at
           the start of its schedule
runs       10 points x 1 seed, 5 epochs each
command    bitfleet sweep cifar_thresholds --data.root /data/cifar10

Bop's threshold has the scale of the gradient, which differs between the layers of BinaryNet by up
to 60 times: the median sqrt(v) of a weight, in the tensors optim.exp_avg_sq.* of the checkpoint
after 3 of 5 epochs of a published run (the first of regime on cifar_small), is 7e-6 in the first
linear layer, 1e-5 to 8e-5 in all layers between, and 4e-4 in the first and the last one.
"""

from math import sqrt

from bitfleet.configs.sweeps.cifar_settings import EPOCHS, Words, line
from bitfleet.configs.sweeps.sweep import TABLE, Label, Point, Sweep, constants

GAMMA_END = 1e-5
"""End of gamma in the published schedule."""
GAMMAS = (1e-2, 3e-3)
"""Starts of gamma: the published one, and the best of cifar_settings."""
HELD: dict[str, dict[float, tuple[float, ...]]] = {
    "bop2ndorder": {1e-2: (0.05, 0.1, 0.2), 3e-3: (0.02, 0.05, 0.1)},
    "bop": {1e-2: (1e-6, 3e-6)},
}
"""Rule -> start of gamma -> constant thresholds."""
FOLLOWING = {1e-2: (1, 2)}
"""Start of gamma -> thresholds of bop2ndorder in multiples of the ratio of noise."""


def _following(multiple: float, gamma: float) -> Words:
    """Return a threshold that falls as sqrt(gamma / 2) does while gamma falls linearly."""
    start, end = (float(f"{multiple * sqrt(rate / 2):.3g}") for rate in (gamma, GAMMA_END))
    return (*line("threshold", start, end), "--optim.threshold.power", "0.5")


def _point(rule: str, gamma: float, threshold: str, words: Words) -> Point:
    common = ("--epochs", str(EPOCHS), "--optim.rule", rule, "--optim.correction", "none")
    labels: dict[str, Label] = {"rule": rule, "gamma": gamma, "threshold": threshold}
    return Point(labels, (*common, *line("gamma", gamma, GAMMA_END), *words))


def sweep() -> Sweep:
    """Return the sweep; sigma and the learning rate are the base's."""
    points = [
        _point(rule, gamma, f"{value:g}", constants("threshold", value))
        for rule, thresholds in HELD.items()
        for gamma, values in thresholds.items()
        for value in values
    ]
    points += [
        _point("bop2ndorder", gamma, f"{multiple} x noise", _following(multiple, gamma))
        for gamma, multiples in FOLLOWING.items()
        for multiple in multiples
    ]
    return Sweep(
        name="cifar_thresholds",
        title="CIFAR-10: thresholds that hold weights back",
        question="How high should the threshold be, at which gamma, and does it need the second moment?",
        base="cifar_small",
        axes={
            "rule": tuple(HELD),
            "gamma": GAMMAS,
            "threshold": tuple(dict.fromkeys(point.labels["threshold"] for point in points)),
        },
        points=tuple(points),
        seeds=(0,),
        figure=TABLE,
    )
