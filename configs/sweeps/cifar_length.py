"""How long must a run on CIFAR-10 be before the order of the rules settles?

section    none: what a short run can say about 500 epochs of 5.2 of arXiv 2104.05124
question   from which number of epochs on is the order of the rules the order of longer runs?
paper      BinaryNet on CIFAR-10, 500 epochs: Bop2ndOrder 91.9 % (91.4 % as coded), Bop 91.3 %
           (arXiv 1906.02107), latent weights 90.9 % (the same)
runs       5 lengths x 5 rules x 1 seed = 25
command    bitfleet sweep cifar_length --data.root /data/cifar10
"""

import itertools

from bitfleet.configs.sweeps.s514_schedulers import staircase
from bitfleet.configs.sweeps.sweep import Figure, Point, Sweep, constants

EPOCHS = (2, 5, 10, 20, 40)
LATENT_LR = ("--optim.latent_lr.kind", "polynomial", "--optim.latent_lr.start", "5e-3", "--optim.latent_lr.end", "0")
ALPHA = ("--optim.alpha.kind", "polynomial", "--optim.alpha.start", "1e-3", "--optim.alpha.end", "0")
PUBLISHED: dict[str, tuple[str, ...]] = {
    "bop2ndorder": ("--optim.rule", "bop2ndorder", "--optim.correction", "none"),
    "bop2ndorder as coded": ("--optim.rule", "bop2ndorder", "--optim.correction", "as_coded"),
    # arXiv 1906.02107, section 5: gamma 1e-4, x0.1 after each 100 of 500 epochs.
    "bop": ("--optim.rule", "bop", *staircase("gamma", 1e-4, 1 / 5), *constants("threshold", 1e-8)),
    # Bi-Real Net of larq-zoo: 5e-3, falling linearly. That of the 90.9 % is not published.
    "latent_adam": ("--optim.rule", "latent_adam", *LATENT_LR),
    "two_ema": ("--optim.rule", "two_ema", *constants("gamma", 0.1), *ALPHA),
}
"""Rule -> its published settings. The full-precision parameters have the base's learning rate."""


def sweep() -> Sweep:
    """Return the sweep, shortest runs first; schedules keep their shape."""
    return Sweep(
        name="cifar_length",
        title="CIFAR-10: length of a run",
        question="From which number of epochs on is the order of the rules that of longer runs?",
        base="cifar_small",
        axes={"epochs": EPOCHS, "rule": tuple(PUBLISHED)},
        points=tuple(
            Point({"epochs": epochs, "rule": rule}, ("--epochs", str(epochs), *PUBLISHED[rule]))
            for epochs, rule in itertools.product(EPOCHS, PUBLISHED)
        ),
        seeds=(0,),
        figure=Figure(facets="rule", grids=(("epochs", "rule"),)),
    )
