"""QuickNet on ImageNet with two averages, no latent weights: nobody has published this.

paper      none; network and images of quicknet_imagenet, rule of arXiv 2303.02452
machine    meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 769 million images, so about 13 at 17,000 images/s
expected   not known
command    deepspeed launch/train.py --config quicknet_imagenet_two_ema \
               --data.root /data/imagenet

Starting values, to be tuned. gamma is a momentum of 0.9. alpha falls to 0 linearly by epoch, as in
the code of the rule, which has no default for where it starts: 1e-3 for batches of 512, as
reactnet_a_imagenet_two_ema, so four times that here, for averages that span as many images. SGD
trains the rest as in the published recipe.
"""

import dataclasses

from bitfleet.configs import quicknet_imagenet
from bitfleet.optim import OptimConfig, Schedule, constant
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run."""
    base = quicknet_imagenet.config()
    return dataclasses.replace(
        base,
        name="quicknet_imagenet_two_ema",
        optim=OptimConfig(
            rule="two_ema",
            gamma=constant(0.1),
            alpha=Schedule(start=4e-3, kind="stairs"),
            full_precision=base.optim.full_precision,
            lr=base.optim.lr,
        ),
    )
