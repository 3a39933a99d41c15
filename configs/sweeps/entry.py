"""Describe an entry of the track: a way to train the binary weights of a fixed network, and the
steps that it needs to a fixed accuracy. docs/track.md has the rules."""

from bitfleet.configs.sweeps.sweep import Point, Sweep

TARGET = 0.7
"""Top-1 on CIFAR-10's 10,000 validation images that every run must reach."""
BASE = "cifar_small"
"""Configuration of the network, the data and the batch."""
MIN_SEEDS = 10
"""Runs of an entry that counts."""
FREE = (
    "name",
    "epochs",
    "seed",
    "optim.",
    "engine.",
    "metrics.",
    "model.compile",
    "model.initial_weights",
    "precise_bn_steps",
)
"""Fields, or their beginnings, that an entry chooses. Fields that say where and how a run is
carried out (folders, threads, devices) are free as well."""


def entry(name: str, title: str, epochs: int, words: tuple[str, ...]) -> Sweep:
    """Return the sweep that runs an entry.

    Args:
        name: of its file, which starts with track_.
        title: the rule and what is special about its setting, for the table.
        epochs: length of a run, over which schedules extend; 1,000 steps each.
        words: of a command line: the update rule and its hyperparameters.
    """
    return Sweep(
        name=name,
        title=title,
        question=f"After how many steps does it reach {TARGET:.0%} top-1?",
        base=BASE,
        axes={"entry": (title,)},
        points=(Point({"entry": title}, ("--epochs", str(epochs), *words)),),
        seeds=tuple(range(MIN_SEEDS)),
    )
