"""Do threshold and second moment matter under the published schedules?

section    none: a claim about the schedules of the published runs (ImageNet and 91.9 % on CIFAR-10)
           of arXiv 2104.05124
question   |m| / sqrt(v) of 1e-3 to 1e-1 is far above every published threshold, so a weight is
           minus the sign of its average gradient: do threshold 0, a frozen second moment and no
           second moment learn as well as the published run?
paper      attributes the gain over Bop to the second moment, without such runs
runs       5 points x 3 seeds = 15
command    bitfleet sweep regime
           on the published schedules themselves: --config binarynet_cifar10, --config
           birealnet18_imagenet

The points change the base's schedules and nothing else:

  published        the base, with correction none
  threshold 0      the same with threshold 0; a weight whose average gradient is exactly 0 becomes
                   +1, as in the official code
  frozen v         sigma is 1e-2, the end of the published schedule, for the first tenth of the run
                   and 0 afterwards: v keeps its values of that time, an average over 100 steps, and
                   the threshold its meaning
  bop threshold 0  no second moment: the sign of the average alone, with the gamma of the base
  threshold high   a threshold that acts: 0.1 is above most ratios of noise; if this point learned
                   alike, the sweep could not tell the others apart
"""

from bitfleet.configs.sweeps.sweep import Point, Sweep, constants

BIASED = ("--optim.rule", "bop2ndorder", "--optim.correction", "none")
FROZEN = tuple(
    "--optim.sigma.kind exponential --optim.sigma.start 1e-2 --optim.sigma.rate 0 --optim.sigma.share 0.1".split()
)


def sweep() -> Sweep:
    """Return the sweep; the learning rate is that of the base."""
    variants = {
        "published": BIASED,
        "threshold 0": (*BIASED, *constants("threshold", 0.0)),
        "frozen v": (*BIASED, *FROZEN),
        "bop threshold 0": ("--optim.rule", "bop", "--optim.correction", "none", *constants("threshold", 0.0)),
        "threshold high": (*BIASED, *constants("threshold", 0.1)),
    }
    return Sweep(
        name="regime",
        title="Threshold and second moment under the published schedules",
        question="Do threshold and second moment matter under the published schedules, "
        "or is the sign of the average all?",
        base="fashion_small",
        axes={"variant": tuple(variants)},
        points=tuple(Point({"variant": name}, overrides) for name, overrides in variants.items()),
    )
