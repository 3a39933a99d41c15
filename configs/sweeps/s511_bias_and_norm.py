"""Biased or unbiased Bop2ndOrder, with BatchNorm or LayerNorm.

section    5.1.1 of arXiv 2104.05124
question   which form of the rule, and which normalisation, learns best?
paper      BinaryNet on CIFAR-10, 150 epochs in batches of 100, threshold 1e-6, gamma 1e-7, sigma 1e-3 and Adam's 1e-2, all held;
           "unbiased" is the class Bop2ndOrder_unbiased (here as_coded). "adam" is ours: Adam's own correction.
runs       3 corrections x 2 norms x 3 seeds = 18
command    bitfleet sweep s511_bias_and_norm
           as in the paper: --config binarynet_cifar10 --epochs 150 --global_batch_size 100 --optim.lr.kind constant
"""

from bitfleet.configs.sweeps.sweep import Point, Sweep, held

HELD = (*held("gamma", 1e-7), *held("sigma", 1e-3), *held("threshold", 1e-6))


def sweep() -> Sweep:
    """The learning rate is the base's."""
    return Sweep(
        name="s511_bias_and_norm",
        title="5.1.1 Bias correction and normalisation",
        question="Does bias correction help Bop2ndOrder, and does it learn better with BatchNorm or with LayerNorm?",
        base="fashion_small",
        points=tuple(
            Point(
                {"correction": correction, "norm": norm},
                ("--optim.rule", "bop2ndorder", "--optim.correction", correction, "--model.norm", norm, *HELD),
            )
            for correction in ("none", "as_coded", "adam")
            for norm in ("batch", "layer")
        ),
    )
