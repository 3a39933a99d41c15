"""QuickNet on ImageNet with latent weights, as published: one stage, no teacher.

paper      arXiv 2011.09398; code larq/zoo 2.4.0, sota/quicknet.py, training/sota_experiments.py
machine    the paper does not state it; here meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 769 million images, so about 13 at 17,000 images/s
expected   63.3 % top-1 (published); `bitfleet reproduce quicknet` has the points of its curve
command    deepspeed launch/train.py --config quicknet_imagenet --data.root /data/imagenet

Latent weights start as a uniform sample, there as a truncated normal one of the same variance. An
epoch is 625 steps, there 626 of which the schedule counts 625: its last 600 steps have a learning
rate of 0. BatchNorm sees the images of a replica, whose number is not stated.
"""

from bitfleet.models import ModelConfig
from bitfleet.optim import OptimConfig, Schedule
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig


def config() -> TrainConfig:
    """The run. Step 0 has a learning rate of 0, step 3,124 the largest."""
    return TrainConfig(
        name="quicknet_imagenet",
        epochs=600,  # sota_experiments.py: epochs
        global_batch_size=2048,  # sota_experiments.py: batch_size
        model=ModelConfig(name="quicknet", num_classes=1000),
        data=DataConfig(
            root="data/imagenet",
            image_size=224,
            preprocessing="official",  # training/data.py: sample_distorted_bounding_box, resize_bicubic, 224/256
            augmentation="random_resized_crop",  # area 0.08-1, aspect 3/4-4/3, flip, nothing else
            mean=(123.675, 116.28, 103.53),  # training/data.py: 255 * (0.485, 0.456, 0.406)
            std=(58.395, 57.12, 57.375),  # training/data.py: 255 * (0.229, 0.224, 0.225)
        ),
        optim=OptimConfig(
            rule="latent_adam",  # CaseOptimizer: Adam for the binary kernels, epsilon 1e-7
            latent_lr=Schedule(start=1e-2, kind="warmup_cosine", warmup_epochs=5),
            latent_clip=1.25,  # sota/quicknet.py: WeightClip(1.25)
            full_precision="keras_sgd",  # CaseOptimizer: SGD, momentum 0.9, for the rest
            lr=Schedule(start=0.1, kind="warmup_cosine", warmup_epochs=5),
            # No regularizer, so no weight decay.
        ),
    )
