"""The track: the rule of two averages, alpha from 1e-3.

section    docs/track.md
question   after how many steps does it reach the target?
paper      arXiv 2303.02452
runs       10 seeds
command    bitfleet sweep track_two_ema --data.root /data/cifar10
"""

from bitfleet.configs.sweeps.cifar_settings import SETTINGS
from bitfleet.configs.sweeps.entry import entry
from bitfleet.configs.sweeps.sweep import Sweep


def sweep() -> Sweep:
    """Return the entry."""
    return entry("track_two_ema", "two_ema", epochs=10, words=SETTINGS["two_ema"]["published"])
