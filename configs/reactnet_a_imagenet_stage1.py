"""ReActNet-A on ImageNet, stage 1 of 2, as published: binary features, real weights, a teacher.

paper      arXiv 2003.03488; code liuzechun/ReActNet at a6cd08d, mobilenet/1_step1/{train.py,run.sh}
machine    the paper does not state it; here meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 164 million images, so about 3 at 17,000 images/s, and the teacher's share
expected   70.1 % top-1 (the author, its issue 21); 69.5 by a user (issue 31)
command    deepspeed launch/train.py --config reactnet_a_imagenet_stage1 --data.root /data/imagenet

The recipe is that of reactnet18_imagenet_stage1 at half of the batch and of the learning rate.
"""

import dataclasses

from bitfleet.configs import reactnet18_imagenet_stage1
from bitfleet.optim import Schedule
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run."""
    base = reactnet18_imagenet_stage1.config()
    return dataclasses.replace(
        base,
        name="reactnet_a_imagenet_stage1",
        global_batch_size=256,  # run.sh
        model=dataclasses.replace(base.model, name="reactnet_a"),
        optim=dataclasses.replace(
            base.optim,
            latent_lr=Schedule(start=1.25e-3, kind="stairs"),  # run.sh
            lr=Schedule(start=1.25e-3, kind="stairs"),
            decayed=("stem.0.weight", "*.threshold.bias", "*activation.[02].bias"),  # there are no other convolutions
        ),
    )
