"""ReActNet-A on ImageNet, stage 2 of 2: binary features and weights, a teacher.

paper      arXiv 2003.03488; code liuzechun/ReActNet at a6cd08d, mobilenet/2_step2/{train.py,run.sh}
machine    the paper does not state it; here meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 164 million images, so about 3 at 17,000 images/s, and the teacher's share
expected   69.5 % top-1 (published; 69.4 in the paper)
command    deepspeed launch/train.py --config reactnet_a_imagenet_stage2 \\
               --data.root /data/imagenet --init runs/reactnet_a_imagenet_stage1/<time>

As published but for the kernels: --init takes them from stage 1, as the paper says. The published
code does not: stage 1 names them otherwise, and loading ignores that (its issue 39), so all 31
start at +1 there, with latent weights between 0 and 0.001.
"""

import dataclasses

from bitfleet.configs import reactnet18_imagenet_stage2
from bitfleet.optim import Schedule
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run: that of ReActNet-18 at half of the batch and of the learning rate."""
    base = reactnet18_imagenet_stage2.config()
    return dataclasses.replace(
        base,
        name="reactnet_a_imagenet_stage2",
        global_batch_size=256,  # run.sh
        model=dataclasses.replace(base.model, name="reactnet_a"),
        optim=dataclasses.replace(
            base.optim,
            latent_lr=Schedule(start=1.25e-3, kind="stairs"),  # run.sh
            lr=Schedule(start=1.25e-3, kind="stairs"),
        ),
    )
