"""Rules of cifar_rules, with their best settings, validated with precise BN.

section    5.2 of arXiv 2104.05124
question   which rule is ahead on the way, when the BatchNorm statistics of a validation are those
           of the weights that it validates? does Bop2ndOrder with its published setting learn
           before its gamma is small?
paper      Bop2ndOrder converges faster than Bop; validated with running averages
runs       5 points x 3 seeds = 15, 5 epochs each
command    bitfleet sweep cifar_precise_bn --data.root /data/cifar10

Training has the same bits as in cifar_rules, so the difference is that of the validations.
"""

from bitfleet.configs.sweeps.cifar_rules import BEST
from bitfleet.configs.sweeps.cifar_settings import EPOCHS, SETTINGS
from bitfleet.configs.sweeps.sweep import Point, Sweep

RULES = {rule: SETTINGS[rule][BEST.get(rule, "published")] for rule in ("bop2ndorder", "latent_adam", "two_ema", "bop")}
RULES["bop2ndorder, published"] = SETTINGS["bop2ndorder"]["published"]
STEPS = 50
"""Whose images give the statistics."""


def sweep() -> Sweep:
    """Return the sweep."""
    return Sweep(
        name="cifar_precise_bn",
        title="CIFAR-10: rules under precise BN",
        question="Which rule is ahead on the way, validated with the statistics of its weights?",
        base="cifar_small",
        axes={"rule": tuple(RULES)},
        points=tuple(
            Point({"rule": rule}, ("--epochs", str(EPOCHS), "--precise_bn_steps", str(STEPS), *words))
            for rule, words in RULES.items()
        ),
        seeds=(0, 1, 2),
    )
