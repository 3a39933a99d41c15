"""ReActNet-18 on ImageNet, stage 2 of 2, as published: binary features and weights, a teacher.

paper      arXiv 2003.03488; code liuzechun/ReActNet at a6cd08d, resnet/2_step2/{train.py,run.sh}
machine    the paper does not state it; here meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 164 million images, so about 3 at 17,000 images/s, and the teacher's share
expected   65.9 % top-1 (published); 63.2 by a user with the published script (its issue 29)
command    deepspeed launch/train.py --config reactnet18_imagenet_stage2 \\
               --data.root /data/imagenet --init runs/reactnet18_imagenet_stage1/<time>

--init reads the last checkpoint of stage 1, as there; its real kernels become the latent weights.
There a kernel is scaled by its mean magnitude, which the BatchNorm after it divides out here: the
gradient of a latent weight differs by that factor, which Adam divides out, too. sign(0) is +1, not
0.
"""

import dataclasses

from bitfleet.configs import reactnet18_imagenet_stage1
from bitfleet.optim import OptimConfig, Schedule
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run: stage 1 with latent weights and without weight decay."""
    stage1 = reactnet18_imagenet_stage1.config()
    return dataclasses.replace(
        stage1,
        name="reactnet18_imagenet_stage2",
        model=dataclasses.replace(stage1.model, initial_weights="signs"),
        optim=OptimConfig(
            rule="latent_adam",
            latent_lr=Schedule(start=2.5e-3, kind="stairs"),  # run.sh; LambdaLR, linear by epoch
            latent_clip=0.0,  # birealnet.py: clamp(-1, 1) inside of the forward pass, no constraint
            latent_eps=1e-8,  # torch.optim.Adam
            init_inertia=0.0,  # the loaded weights are latent ones already
            full_precision="adam",
            lr=Schedule(start=2.5e-3, kind="stairs"),
            # run.sh: weight_decay 0
        ),
    )
