"""A small Bi-Real Net on the embedded Fashion-MNIST subset: the whole of bitfleet in minutes.

paper      none; the schedules are those of birealnet18_imagenet (arXiv 2104.05124), scaled to the
           run
machine    2 CPU cores
hours      0.05
expected   88 % top-1
command    deepspeed --num_accelerators 2 launch/train.py --config fashion_quickstart
"""

from bitfleet.models import ModelConfig
from bitfleet.optim import OptimConfig, linear
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig


def config() -> TrainConfig:
    """The run."""
    return TrainConfig(
        name="fashion_quickstart",
        epochs=24,
        global_batch_size=128,
        precise_bn_steps=10,  # running averages lag behind flips: the end scattered between 86 and 89 %
        model=ModelConfig(name="birealnet_small", width=32, num_classes=10),  # 294,912 binary weights
        data=DataConfig(
            root="fashion-mnist",
            image_size=32,
            augmentation="pad_crop",
            crop_padding=4,
            mean=(127.5, 127.5, 127.5),
            std=(127.5, 127.5, 127.5),
        ),
        optim=OptimConfig(
            gamma=linear(3e-4, 1e-5),
            sigma=linear(1e-4, 1e-2),
            threshold=linear(1e-8, 1e-5),
            lr=linear(2.5e-3, 5e-6),
        ),
    )
