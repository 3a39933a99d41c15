"""The track: Bop2ndOrder as in the paper's run on CIFAR-10, but for gamma, which starts at 3e-3.

section    docs/track.md
question   after how many steps does it reach the target?
paper      arXiv 2104.05124, set bop2ndOrder_CIFAR: gamma from 1e-2, over 500 epochs
runs       10 seeds
command    bitfleet sweep track_bop2ndorder --data.root /data/cifar10
"""

from bitfleet.configs.sweeps.cifar_settings import SETTINGS
from bitfleet.configs.sweeps.entry import entry
from bitfleet.configs.sweeps.sweep import Sweep


def sweep() -> Sweep:
    """Return the entry."""
    words = SETTINGS["bop2ndorder"]["gamma from 3e-3"]
    return entry("track_bop2ndorder", "bop2ndorder, gamma from 3e-3", epochs=12, words=words)
