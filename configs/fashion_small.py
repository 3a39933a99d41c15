"""A network small enough for sweeps: one run on one core takes half a minute.

paper      none; the schedules are those of fashion_quickstart
machine    1 CPU core
hours      0.01
expected   83 % top-1
command    bitfleet train --config fashion_small --num_threads 1
"""

from bitfleet.models import ModelConfig
from bitfleet.optim import OptimConfig, linear
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig


def config() -> TrainConfig:
    """The run. 744 steps; the last 48 images of an epoch do not fill a batch of 64."""
    return TrainConfig(
        name="fashion_small",
        epochs=8,
        global_batch_size=64,
        model=ModelConfig(name="birealnet_small", width=16, num_classes=10, norm="batch"),  # 73,728 binary weights
        data=DataConfig(
            root="fashion-mnist",
            image_size=28,
            augmentation="pad_crop",
            crop_padding=2,
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
