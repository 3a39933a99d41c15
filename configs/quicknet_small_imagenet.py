"""QuickNetSmall on ImageNet with latent weights, as published: one stage, no teacher.

paper      arXiv 2011.09398; code larq/zoo 2.4.0, sota/quicknet.py, training/sota_experiments.py
machine    the paper does not state it; here meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 769 million images, so about 13 at 17,000 images/s
expected   59.4 % top-1 (published); `bitfleet reproduce quicknet_small` has the points of its curve
command    deepspeed launch/train.py --config quicknet_small_imagenet --data.root /data/imagenet

The recipe is that of quicknet_imagenet.
"""

import dataclasses

from bitfleet.configs import quicknet_imagenet
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run."""
    base = quicknet_imagenet.config()
    model = dataclasses.replace(base.model, name="quicknet_small")
    return dataclasses.replace(base, name="quicknet_small_imagenet", model=model)
