"""Do threshold and second moment matter under the published schedules?

section    none: a claim about the schedules of the published runs (ImageNet and 91.9 % on CIFAR-10) of arXiv 2104.05124
question   with |m| / sqrt(v) of 1e-3 to 1e-1 far above every published threshold, a weight is minus the sign of its average
           gradient: then threshold 0, a frozen second moment and none at all learn as well as the published run
paper      says that the second moment gives the gain over Bop; has no such runs
runs       5 points x 3 seeds = 15
command    bitfleet sweep regime
           on published schedules themselves: --config binarynet_cifar10, --config birealnet18_imagenet

The points change the base's schedules and nothing else:

  published        the base as it is (correction none)
  threshold 0      the same with threshold 0. A weight whose average gradient is 0 exactly becomes +1 (the official tie).
  frozen v         sigma is 1e-2, the end of the published schedule, for the first tenth of the run and exactly 0 afterwards: v
                   stays, weight by weight, what it was then, an average over 100 steps. The threshold keeps its meaning.
  bop threshold 0  no second moment at all: the sign of the average alone, with the base's gamma
  threshold high   a control that the others need: threshold 0.1 is above most ratios. If this one learned as well too, the sweep
                   could not tell.
"""

from bitfleet.configs.sweeps.sweep import Point, Sweep, held

BIASED = ("--optim.rule", "bop2ndorder", "--optim.correction", "none")
FROZEN = tuple(
    "--optim.sigma.kind exponential --optim.sigma.start 1e-2 --optim.sigma.rate 0 --optim.sigma.share 0.1".split()
)


def sweep() -> Sweep:
    """The learning rate is the base's."""
    variants = {
        "published": BIASED,
        "threshold 0": (*BIASED, *held("threshold", 0.0)),
        "frozen v": (*BIASED, *FROZEN),
        "bop threshold 0": ("--optim.rule", "bop", "--optim.correction", "none", *held("threshold", 0.0)),
        "threshold high": (*BIASED, *held("threshold", 0.1)),
    }
    return Sweep(
        name="regime",
        title="Threshold and second moment under the published schedules",
        question="Do threshold and second moment matter under the published schedules, or is the sign of the average all?",
        base="fashion_small",
        points=tuple(Point({"variant": name}, overrides) for name, overrides in variants.items()),
    )
