"""ReActNet-18 on ImageNet, stage 1 of 2, as published: binary features, real weights, a teacher.

paper      arXiv 2003.03488; code liuzechun/ReActNet at a6cd08d, resnet/1_step1/{train.py,run.sh}
machine    the paper does not state it; here meant for 8 GPUs (not run by us: no GPU was at hand)
hours      not measured; 164 million images, so about 3 at 17,000 images/s, and the teacher's share
expected   not published
command    deepspeed launch/train.py --config reactnet18_imagenet_stage1 --data.root /data/imagenet

The teacher's weights are torchvision's, which timm downloads; --distill.weights FILE reads them
from a file. Kernels start as a normal sample, there as torch's uniform one. BatchNorm sees the
images of a replica; the number of GPUs is not stated. The epoch of the best validation was
published, here the last one counts.
"""

from bitfleet.models import ModelConfig
from bitfleet.optim import OptimConfig, Schedule
from bitfleet.trainer.config import TrainConfig
from bitfleet.trainer.data import DataConfig
from bitfleet.trainer.distillation import DistillConfig


def config() -> TrainConfig:
    """The run. scheduler.step() comes before each epoch: the first has 127/128 of the learning
    rate, the last 0, in which only running statistics change."""
    return TrainConfig(
        name="reactnet18_imagenet_stage1",
        epochs=128,  # run.sh
        global_batch_size=512,  # run.sh
        model=ModelConfig(name="reactnet18", num_classes=1000, initial_weights="real"),
        data=DataConfig(
            root="data/imagenet",
            image_size=224,
            augmentation="random_resized_crop",  # train.py: torchvision's defaults; Resize 256, CenterCrop 224
            color_lighting=True,  # train.py: Lighting(0.1)
            mean=(123.675, 116.28, 103.53),  # train.py: 255 * (0.485, 0.456, 0.406)
            std=(58.395, 57.12, 57.375),  # train.py: 255 * (0.229, 0.224, 0.225)
        ),
        optim=OptimConfig(
            rule="real_adam",  # the layers of stage 2, with real weights
            latent_lr=Schedule(start=2.5e-3, kind="stairs"),  # run.sh; LambdaLR, linear by epoch
            latent_decay=1e-5,  # run.sh
            full_precision="adam",  # torch.optim.Adam, L2 inside
            lr=Schedule(start=2.5e-3, kind="stairs"),
            weight_decay=1e-5,
            # train.py: p.ndim == 4 or "conv" in its name: convolutions, biases of RSign and RPReLU.
            decayed=("stem.0.weight", "*.shortcut.1.weight", "*.threshold.bias", "*activation.[02].bias"),
        ),
        # KD_loss.py: soft cross-entropy alone; train.py's loss with smoothed labels is not used.
        distill=DistillConfig(teacher="resnet34.tv_in1k", temperature=1.0, label_weight=0.0),
    )
