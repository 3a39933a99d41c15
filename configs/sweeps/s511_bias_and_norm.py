"""Biased or unbiased Bop2ndOrder, with BatchNorm or LayerNorm.

section    5.1.1 of arXiv 2104.05124
question   which form of the rule and which normalization learn best?
paper      BinaryNet on CIFAR-10, 150 epochs in batches of 100, constant threshold 1e-6, gamma 1e-7,
           sigma 1e-3, and learning rate 1e-2 of Adam; "unbiased" is the class Bop2ndOrder_unbiased
           (here as_coded). The correction "adam", as in Adam itself, is our addition.
runs       3 corrections x 2 norms x 3 seeds = 18
command    bitfleet sweep s511_bias_and_norm
           as in the paper: --config binarynet_cifar10 --epochs 150 --global_batch_size 100
           --optim.lr.kind constant
"""

from bitfleet.configs.sweeps.sweep import Figure, Point, Sweep, constants

CORRECTIONS, NORMS = ("none", "as_coded", "adam"), ("batch", "layer")
HELD = (*constants("gamma", 1e-7), *constants("sigma", 1e-3), *constants("threshold", 1e-6))


def sweep() -> Sweep:
    """Return the sweep; the learning rate is that of the base."""
    return Sweep(
        name="s511_bias_and_norm",
        title="5.1.1 Bias correction and normalization",
        question="Does bias correction help Bop2ndOrder, and does it learn better with BatchNorm or with LayerNorm?",
        base="fashion_small",
        axes={"correction": CORRECTIONS, "norm": NORMS},
        points=tuple(
            Point(
                {"correction": correction, "norm": norm},
                ("--optim.rule", "bop2ndorder", "--optim.correction", correction, "--model.norm", norm, *HELD),
            )
            for correction in CORRECTIONS
            for norm in NORMS
        ),
        figure=Figure(
            grids=(("correction", "norm"),), labels={"none": "biased", "batch": "BatchNorm", "layer": "LayerNorm"}
        ),
    )
