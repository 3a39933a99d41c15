"""Blocks and teachers: does what ReActNet adds to a Bi-Real Net help a small network?

section    none: ReActNet (arXiv 2003.03488) on Fashion-MNIST
question   do learned thresholds and activations, and a full-precision teacher, raise the accuracy
           of a small Bi-Real Net, with Bop2ndOrder and with latent weights?
paper      ReActNet-18 with a teacher, two stages and latent weights on ImageNet: 65.9 % (its
           README), where Bi-Real Net 18 has 56.4 %
runs       8 points x 3 seeds = 24
command    bitfleet train --config fashion_small --model.name resnet10t --model.width None \
               --model.norm None --run_dir runs/teachers/resnet10t
           bitfleet checkpoint weights runs/teachers/resnet10t \
               runs/teachers/resnet10t.safetensors
           bitfleet sweep blocks

Both networks have the same binary convolutions (73,728 weights). A point with a teacher trains on
its probabilities alone, as ReActNet does.
"""

import itertools

from bitfleet.configs.sweeps.sweep import Figure, Point, Sweep

NETWORKS = {
    "Bi-Real": "--model.name birealnet_small",
    "ReActNet": "--model.name reactnet_small --model.norm None",
}
TEACHERS = {
    "labels": "",
    "resnet10t": "--distill.teacher resnet10t --distill.weights runs/teachers/resnet10t.safetensors",
}
RULES = {
    "bop2ndorder": "--optim.rule bop2ndorder --optim.correction none",
    "latent_adam": "--optim.rule latent_adam --optim.latent_lr.kind polynomial --optim.latent_lr.start 5e-3 "
    "--optim.latent_lr.end 0",
}


def sweep() -> Sweep:
    """Return the sweep; everything else is that of the base."""
    axes = {"blocks": NETWORKS, "learns from": TEACHERS, "rule": RULES}
    points = []
    for names in itertools.product(*axes.values()):
        words = " ".join(options[name] for options, name in zip(axes.values(), names, strict=True))
        points.append(Point(dict(zip(axes, names, strict=True)), tuple(words.split())))
    return Sweep(
        name="blocks",
        title="Blocks and teachers",
        question="Do ReActNet's thresholds and activations, and a full-precision teacher, help a small Bi-Real Net?",
        base="fashion_small",
        axes={axis: tuple(options) for axis, options in axes.items()},
        points=tuple(points),
        figure=Figure(facets="rule"),
    )
