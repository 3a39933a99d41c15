"""Optimizers side by side.

section    5.2 of arXiv 2104.05124
question   which rule for the binary weights reaches the best accuracy, and which is fastest?
paper      BinaryNet on CIFAR-10, 500 epochs in batches of 50: Bop2ndOrder 91.9 % (biased) and 91.4 % (unbiased), Bop 91.3 %.
           Schedules of the rules here: those of the base for every hyperparameter that a rule shares with Bop2ndOrder, the
           published constants of the rule for its own. Nothing is tuned.
runs       4 rules x 3 seeds = 12
command    bitfleet sweep s52_optimizers
           on the paper's network: --config binarynet_cifar10
"""

from bitfleet.trainer.sweep import Point, Sweep

RULES: dict[str, str] = {
    "bop2ndorder": "--optim.rule bop2ndorder --optim.correction none",
    "bop2ndorder as coded": "--optim.rule bop2ndorder --optim.correction as_coded",
    "bop2ndorder adam": "--optim.rule bop2ndorder --optim.correction adam",
    # threshold 1e-8, held: arXiv 1906.02107, section 5.
    "bop": "--optim.rule bop --optim.correction none --optim.threshold.kind constant --optim.threshold.start 1e-8",
}
"""Name of the optimizer -> its options. A further rule is a further line."""


def sweep() -> Sweep:
    """The learning rate of the full-precision parameters is the base's for all of them."""
    return Sweep(
        name="s52_optimizers",
        title="5.2 Optimizers",
        question="Which rule for the binary weights reaches the best accuracy, and which gets there first?",
        base="fashion_small",
        points=tuple(Point({"optimizer": name}, tuple(options.split())) for name, options in RULES.items()),
    )
