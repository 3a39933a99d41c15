"""BinaryNet with a quarter of the channels on CIFAR-10: the base of sweeps that a CPU can finish.

paper      arXiv 2104.05124 with a smaller network and 10 epochs in place of 500; everything else,
           and the shape of the schedules, is that of binarynet_cifar10
machine    1 CPU core
hours      0.2
expected   64 % top-1 in bf16 (one seed; images re-encoded as JPEG)
command    bitfleet train --config cifar_small --data.root /data/cifar10 --num_threads 1 \\
               --engine.precision bf16  (on a CPU without AVX-512: fp32, docs/precision.md)
"""

import dataclasses

from bitfleet.configs import binarynet_cifar10
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run: 649,568 binary weights, 1,000 steps an epoch."""
    paper = binarynet_cifar10.config()
    return dataclasses.replace(paper, name="cifar_small", epochs=10, model=dataclasses.replace(paper.model, width=32))
