"""ReActNet-A on ImageNet in one stage with Bop2ndOrder: nobody has published this.

paper      none; network, images and teacher of reactnet_a_imagenet_stage1, rates of
           birealnet18_imagenet (arXiv 2104.05124)
machine    meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 328 million images, so about 5 at 17,000 images/s, and the teacher's share
expected   not known
command    deepspeed launch/train.py --config reactnet_a_imagenet_bop2ndorder \\
               --data.root /data/imagenet

Starting values, to be tuned. As many images as both stages together, but batches of 1,024, for
which Bop2ndOrder's rates are published: of Bi-Real Net 18, the nearest network. Its learning rate
of the rest, too. Bits have no weight decay, and stage 2 has none for the rest.
"""

import dataclasses

from bitfleet.configs import reactnet_a_imagenet_stage1
from bitfleet.optim import OptimConfig, linear
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run. Kernels hold real values until the first update, as in all runs of the paper."""
    return dataclasses.replace(
        reactnet_a_imagenet_stage1.config(),
        name="reactnet_a_imagenet_bop2ndorder",
        epochs=256,
        global_batch_size=1024,
        optim=OptimConfig(
            rule="bop2ndorder",
            gamma=linear(1e-4, 1e-9),
            sigma=linear(1e-5, 1e-2),
            threshold=linear(1e-8, 1e-5),
            lr=linear(2.5e-3, 5e-6),
        ),
    )
