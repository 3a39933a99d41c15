"""BinaryNet on CIFAR-10 with the official "unbiased" Bop2ndOrder, as in the paper.

paper      arXiv 2104.05124; code CuauSuarez/Bop2ndOrder, branch conference,
           models/binarynet_batch.py, set bop2ndOrder_unbiased_CIFAR
machine    the paper does not state it; one GPU (not run by us: no GPU was at hand); 12 minutes an
           epoch on 2 CPU cores
hours      not measured
expected   91.4 % top-1 (published)
command    deepspeed --num_accelerators 1 launch/train.py --config binarynet_cifar10_as_coded \\
               --data.root /data/cifar10
"""

import dataclasses

from bitfleet.configs import binarynet_cifar10
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The biased run, but for the correction: moments divided by the scheduled gamma and sigma
    (Bop2ndOrder_unbiased)."""
    biased = binarynet_cifar10.config()
    return dataclasses.replace(
        biased, name="binarynet_cifar10_as_coded", optim=dataclasses.replace(biased.optim, correction="as_coded")
    )
