"""Optimizers side by side.

section    5.2 of arXiv 2104.05124
question   which rule for the binary weights reaches the best accuracy, and which is fastest?
paper      BinaryNet on CIFAR-10, 500 epochs in batches of 50: Bop2ndOrder 91.9 % (biased) and 91.4
           % (unbiased), Bop 91.3 %. Here Bop2ndOrder and Bop have the schedules of the base. The
           other rules have the constants of their papers and code, and one more setting each,
           because constants for hundreds of epochs may not fit a short run; both settings are
           reported. Learning rates fall linearly to 0.
runs       18 points x 3 seeds = 54
command    bitfleet sweep s52_optimizers
           on the paper's network: --config binarynet_cifar10
"""

from bitfleet.configs.sweeps.sweep import Figure, Point, Sweep, constants


def _rule(name: str, **held_values: float) -> str:
    return f"--optim.rule {name} " + " ".join(
        word for hyperparameter, value in held_values.items() for word in constants(hyperparameter, value)
    )


def _falling(hyperparameter: str, start: float) -> str:
    option = f"--optim.{hyperparameter}"
    return f" {option}.kind polynomial {option}.start {start:g} {option}.end 0"


OPTIMIZERS: dict[str, str] = {
    "bop2ndorder": "--optim.rule bop2ndorder --optim.correction none",
    "bop2ndorder as coded": "--optim.rule bop2ndorder --optim.correction as_coded",
    "bop2ndorder adam": "--optim.rule bop2ndorder --optim.correction adam",
    "bop2ndorder, TRS on gamma": _rule("bop2ndorder", gamma=1e-4) + " --optim.transitions.drives gamma",
    # constant threshold 1e-8: arXiv 1906.02107, section 5.
    "bop": _rule("bop", threshold=1e-8),
    # Bi-Real Net of larq-zoo: 5e-3, falling linearly.
    "latent_adam 5e-3": "--optim.rule latent_adam" + _falling("latent_lr", 5e-3),
    "latent_adam 1e-3": "--optim.rule latent_adam" + _falling("latent_lr", 1e-3),
    "latent_adam, TRS": _rule("latent_adam", latent_lr=1e-3) + " --optim.transitions.drives latent_lr",
    "latent_sgd 0.1": "--optim.rule latent_sgd" + _falling("latent_lr", 0.1),
    "latent_sgd 1": "--optim.rule latent_sgd" + _falling("latent_lr", 1.0),
    "two_ema 1e-3": _rule("two_ema", gamma=0.1) + _falling("alpha", 1e-3),
    "two_ema 1e-2": _rule("two_ema", gamma=0.1) + _falling("alpha", 1e-2),
    # The threshold of the paper's runs, and the default of its code.
    "sgdat 1e-7": _rule("sgdat", latent_lr=1e-4, threshold=1e-7),
    "sgdat 1e-6": _rule("sgdat", latent_lr=1e-4, threshold=1e-6),
    "diode 1e-4": _rule("diode", gamma=1e-2, alpha=1e-4, latent_lr=1e-3),
    "diode 1e-2": _rule("diode", gamma=1e-2, alpha=1e-2, latent_lr=1e-3),
    "bnew 1e-3": "--optim.rule bnew --optim.rho 1e-3",
    "bnew 1e-2": "--optim.rule bnew --optim.rho 1e-2",
}
"""Name of the optimizer, with the setting that varies -> its options."""


def sweep() -> Sweep:
    """Return the sweep; the learning rate of the full-precision parameters is that of the base for
    all points."""
    return Sweep(
        name="s52_optimizers",
        title="5.2 Optimizers",
        question="Which rule for the binary weights reaches the best accuracy, and which gets there first?",
        base="fashion_small",
        axes={"optimizer": tuple(OPTIMIZERS)},
        points=tuple(Point({"optimizer": name}, tuple(options.split())) for name, options in OPTIMIZERS.items()),
        figure=Figure(facets="optimizer"),
    )
