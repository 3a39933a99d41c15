"""The track: Bop2ndOrder with the schedules of the paper's run on CIFAR-10.

section    docs/track.md
question   after how many steps does it reach the target?
paper      arXiv 2104.05124, set bop2ndOrder_CIFAR, here over 20 epochs
runs       10 seeds
command    bitfleet sweep track_bop2ndorder --data.root /data/cifar10
"""

from bitfleet.configs.sweeps.cifar_settings import SETTINGS
from bitfleet.configs.sweeps.entry import entry
from bitfleet.configs.sweeps.sweep import Sweep


def sweep() -> Sweep:
    """Return the entry."""
    return entry("track_bop2ndorder", "bop2ndorder", epochs=20, words=SETTINGS["bop2ndorder"]["published"])
