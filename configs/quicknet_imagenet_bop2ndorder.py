"""QuickNet on ImageNet with Bop2ndOrder in place of latent weights: nobody has published this.

paper      none; network and images of quicknet_imagenet, rates of birealnet18_imagenet (arXiv
           2104.05124)
machine    meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 769 million images, so about 13 at 17,000 images/s
expected   not known
command    deepspeed launch/train.py --config quicknet_imagenet_bop2ndorder \\
               --data.root /data/imagenet

Starting values, to be tuned. The rates of Bi-Real Net 18, whose binary layers have the same sizes,
are for batches of 1,024; twice the batch takes half of the steps, so gamma and sigma are doubled
and averages span as many images. Thresholds compare a ratio and stay. SGD trains the rest as in
the published recipe.
"""

import dataclasses

from bitfleet.configs import quicknet_imagenet
from bitfleet.optim import OptimConfig, linear
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run."""
    base = quicknet_imagenet.config()
    return dataclasses.replace(
        base,
        name="quicknet_imagenet_bop2ndorder",
        model=dataclasses.replace(base.model, initial_weights="real"),  # as in all runs of the paper
        optim=OptimConfig(
            rule="bop2ndorder",
            gamma=linear(2e-4, 2e-9),
            sigma=linear(2e-5, 2e-2),
            threshold=linear(1e-8, 1e-5),
            full_precision=base.optim.full_precision,
            lr=base.optim.lr,
        ),
    )
