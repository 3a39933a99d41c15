"""BinaryNet on CIFAR-10 with biased Bop2ndOrder, as in the paper.

paper      arXiv 2104.05124; code CuauSuarez/Bop2ndOrder, branch conference,
           models/binarynet_batch.py, set bop2ndOrder_CIFAR
machine    the paper does not state it; one GPU (not run by us: no GPU was at hand); 12 minutes an
           epoch on 2 CPU cores
hours      not measured
expected   91.9 % top-1 (published)
command    deepspeed --num_accelerators 1 launch/train.py --config binarynet_cifar10 \\
               --data.root /data/cifar10

--data.root is made by `bitfleet data prepare cifar-10-python.tar.gz /data/cifar10`. The paper's
code has one replica: BatchNorm sees 50 images.
"""

from bitfleet.models import ModelConfig
from bitfleet.optim import OptimConfig, linear
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig


def config() -> TrainConfig:
    """The run. A schedule without a length ends after epochs * 50,000 // 50 = 500,000 steps, as in
    the code."""
    return TrainConfig(
        name="binarynet_cifar10",
        epochs=500,  # binarynet_batch.py, bop2ndOrder_CIFAR: epochs
        global_batch_size=50,  # bop2ndOrder_CIFAR: batch_size
        model=ModelConfig(
            name="binarynet",
            num_classes=10,
            norm="batch",
            initial_weights="real",  # the kernels hold Glorot values until the first update
        ),
        data=DataConfig(
            root="data/cifar10",
            image_size=32,
            augmentation="pad_crop",  # data/cifar10.py: pad to 40, crop 32, flip
            crop_padding=4,
            loader="memory",  # 0.27 GB; decoding would be most of a GPU step of 50 images
            mean=(127.5, 127.5, 127.5),  # data/cifar10.py: x / 127.5 - 1
            std=(127.5, 127.5, 127.5),
        ),
        optim=OptimConfig(
            rule="bop2ndorder",
            correction="none",  # the class Bop2ndOrder, biased
            gamma=linear(1e-2, 1e-5),  # PolynomialDecay, power 1, per step; so are the other three
            sigma=linear(1e-7, 1e-2),
            threshold=linear(1e-5, 1e-8),  # falls, unlike on ImageNet
            lr=linear(1e-2, 1e-3),  # Keras Adam, beta 0.9 and 0.999, epsilon 1e-7
        ),
    )
