"""ReActNet-18 on ImageNet in one stage with two averages: nobody has published this.

paper      none; network, images and teacher of reactnet18_imagenet_stage1; rule, batch, epochs
           and learning rate of arXiv 2303.02452 (jorisquist/Understanding-WM-HP-in-BNNs)
machine    meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 328 million images, so about 5 at 17,000 images/s, and the teacher's share
expected   not known
command    deepspeed launch/train.py --config reactnet18_imagenet_two_ema --data.root /data/imagenet

Starting values, to be tuned. The paper of the rule trains ReActNet-A in one stage,
with batches of 512, 256 epochs, Adam 1e-3 for the rest, and alpha falling to 0 linearly by epoch.
Its code has no default for gamma and for where alpha starts: 0.1 is a momentum of 0.9, 1e-3 is
bitfleet's default.
"""

import dataclasses

from bitfleet.configs import reactnet18_imagenet_stage1
from bitfleet.optim import OptimConfig, Schedule, constant
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run."""
    base = reactnet18_imagenet_stage1.config()
    return dataclasses.replace(
        base,
        name="reactnet18_imagenet_two_ema",
        epochs=256,
        global_batch_size=512,
        model=dataclasses.replace(base.model, initial_weights="signs"),
        optim=OptimConfig(
            rule="two_ema",
            gamma=constant(0.1),
            alpha=Schedule(start=1e-3, kind="stairs"),
            full_precision="adam",
            lr=Schedule(start=1e-3, kind="stairs"),
        ),
    )
