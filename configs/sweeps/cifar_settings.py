"""Settings of each rule for a short run on CIFAR-10: the published one, and a few around it.

section    none: 5.2 of arXiv 2104.05124 compares settings that are meant for 500 epochs
question   which setting of each rule is best in a run of a few epochs?
paper      has no grid for the rules that it compares with
runs       20 points x 1 seed, 5 epochs each
command    bitfleet sweep cifar_settings --data.root /data/cifar10
"""

from bitfleet.configs.sweeps.s514_schedulers import staircase
from bitfleet.configs.sweeps.sweep import TABLE, Point, Sweep, constants

Words = tuple[str, ...]
EPOCHS = 5


def line(hyperparameter: str, start: float, end: float) -> Words:
    """Return the overrides for a linear change over the run."""
    option = f"--optim.{hyperparameter}"
    return (f"{option}.kind", "polynomial", f"{option}.start", f"{start:g}", f"{option}.end", f"{end:g}")


def _bop2ndorder(correction: str, *words: str) -> Words:
    return ("--optim.rule", "bop2ndorder", "--optim.correction", correction, *words)


def _bop(*gamma: str) -> Words:
    return ("--optim.rule", "bop", *gamma, *constants("threshold", 1e-8))


def _latent_adam(start: float) -> Words:
    return ("--optim.rule", "latent_adam", *line("latent_lr", start, 0))


def _two_ema(alpha: float) -> Words:
    return ("--optim.rule", "two_ema", *constants("gamma", 0.1), *line("alpha", alpha, 0))


SETTINGS: dict[str, dict[str, Words]] = {
    "bop2ndorder": {
        "published": _bop2ndorder("none"),  # the base's schedules; gamma falls from 1e-2 to 1e-5
        "gamma from 1e-1": _bop2ndorder("none", *line("gamma", 1e-1, 1e-5)),
        "gamma from 3e-3": _bop2ndorder("none", *line("gamma", 3e-3, 1e-5)),
        "gamma from 1e-3": _bop2ndorder("none", *line("gamma", 1e-3, 1e-5)),
        "sigma 1e-3": _bop2ndorder("none", *constants("sigma", 1e-3)),
        "threshold 1e-2": _bop2ndorder("none", *constants("threshold", 1e-2)),
    },
    "bop2ndorder as coded": {
        "published": _bop2ndorder("as_coded"),
        "gamma from 3e-3": _bop2ndorder("as_coded", *line("gamma", 3e-3, 1e-5)),
        "gamma from 1e-3": _bop2ndorder("as_coded", *line("gamma", 1e-3, 1e-5)),
    },
    "bop": {
        "published": _bop(*staircase("gamma", 1e-4, 1 / 5)),  # arXiv 1906.02107, 5: x0.1 after 100 of 500 epochs
        "gamma from 1e-2": _bop(*line("gamma", 1e-2, 1e-5)),
        "gamma from 3e-3": _bop(*line("gamma", 3e-3, 1e-5)),
        "gamma from 1e-3": _bop(*line("gamma", 1e-3, 1e-5)),
        "gamma 1e-3, stairs": _bop(*staircase("gamma", 1e-3, 1 / 5)),
    },
    "latent_adam": {
        "published": _latent_adam(5e-3),  # Bi-Real Net of larq-zoo; the rate behind the 90.9 % is not published
        "from 1e-2": _latent_adam(1e-2),
        "from 1e-3": _latent_adam(1e-3),
    },
    "two_ema": {
        "published": _two_ema(1e-3),
        "alpha from 1e-2": _two_ema(1e-2),
        "alpha from 1e-4": _two_ema(1e-4),
    },
}
"""Rule -> name of the setting -> its options. Lines end where the published ones end."""


def sweep() -> Sweep:
    """Return the sweep; the full-precision parameters have the base's learning rate."""
    names = dict.fromkeys(name for settings in SETTINGS.values() for name in settings)
    return Sweep(
        name="cifar_settings",
        title="CIFAR-10: settings of each rule",
        question="Which setting of each rule is best in a run of five epochs?",
        base="cifar_small",
        axes={"rule": tuple(SETTINGS), "setting": tuple(names)},
        points=tuple(
            Point({"rule": rule, "setting": name}, ("--epochs", str(EPOCHS), *words))
            for rule, settings in SETTINGS.items()
            for name, words in settings.items()
        ),
        seeds=(0,),
        figure=TABLE,
    )
