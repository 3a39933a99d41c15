"""The track: latent weights with Adam, 5e-3 falling linearly.

section    docs/track.md
question   after how many steps does it reach the target?
paper      larq-zoo's rate for Bi-Real Net
runs       10 seeds
command    bitfleet sweep track_latent_adam --data.root /data/cifar10
"""

from bitfleet.configs.sweeps.cifar_settings import SETTINGS
from bitfleet.configs.sweeps.entry import entry
from bitfleet.configs.sweeps.sweep import Sweep


def sweep() -> Sweep:
    """Return the entry."""
    return entry("track_latent_adam", "latent_adam", epochs=8, words=SETTINGS["latent_adam"]["published"])
