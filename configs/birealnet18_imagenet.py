"""Bi-Real Net 18 on ImageNet with Bop2ndOrder, as in the paper.

paper      arXiv 2104.05124; code CuauSuarez/Bop2ndOrder, branch conference,
           models/birealnet_batch.py, set bop2ndOrder_ImageNet
machine    the paper does not state it; here meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 192 million images, so about 3 at 17,000 images/s
expected   57.2 % top-1 (published; over the first 49,152 validation images)
command    deepspeed launch/train.py --config birealnet18_imagenet --data.root /data/imagenet

Crops, resize and evaluation are those of the paper's TensorFlow code (--data.preprocessing
torchvision: the usual ones, whose crops are 11 to 17 % larger on average).
"""

from bitfleet.models import ModelConfig
from bitfleet.optim import OptimConfig, linear
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig


def config() -> TrainConfig:
    """The run. A schedule without a length ends after epochs * 1,281,167 // 1024 = 187,670 steps,
    as in the code."""
    return TrainConfig(
        name="birealnet18_imagenet",
        epochs=150,  # birealnet_batch.py: epochs
        global_batch_size=1024,  # birealnet_batch.py: batch_size
        model=ModelConfig(
            name="birealnet18",
            num_classes=1000,
            norm="batch",
            initial_weights="real",  # the kernels hold Glorot values until the first update
        ),
        data=DataConfig(
            root="data/imagenet",
            image_size=224,
            preprocessing="official",  # sample_distorted_bounding_box, resize_bicubic, central 224/256
            augmentation="random_resized_crop",  # data/imagenet.py: area 0.08-1, aspect 3/4-4/3, flip, nothing else
            mean=(123.675, 116.28, 103.53),  # data/imagenet.py: 255 * (0.485, 0.456, 0.406)
            std=(58.395, 57.12, 57.375),  # data/imagenet.py: 255 * (0.229, 0.224, 0.225)
        ),
        optim=OptimConfig(
            rule="bop2ndorder",
            correction="none",  # the class Bop2ndOrder, biased
            gamma=linear(1e-4, 1e-9),  # PolynomialDecay, power 1, per step; so are the other three
            sigma=linear(1e-5, 1e-2),
            threshold=linear(1e-8, 1e-5),
            lr=linear(2.5e-3, 5e-6),  # Keras Adam, beta 0.9 and 0.999, epsilon 1e-7
            # The code defines kernel_regularizer l2(5e-7) but never uses it: no weight decay.
        ),
    )
