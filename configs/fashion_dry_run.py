"""A miniature Bi-Real Net on the embedded Fashion-MNIST subset: what `bitfleet reproduce NAME
--dry_run` trains.

paper      none; the schedules are those of fashion_quickstart
machine    1 CPU core
hours      0.02
expected   80.6 % top-1 (79.3 to 81.9 in seven runs)
command    bitfleet reproduce birealnet18 --dry_run; alone: bitfleet train --config fashion_dry_run
"""

import dataclasses

from bitfleet.configs import fashion_quickstart
from bitfleet.trainer.config import TrainConfig


def config() -> TrainConfig:
    """The run: fashion_quickstart with half of the channels and a quarter of the epochs, the same
    bits on any number of cores."""
    long = fashion_quickstart.config()
    return dataclasses.replace(
        long, name="fashion_dry_run", epochs=6, num_threads=1, model=dataclasses.replace(long.model, width=16)
    )
