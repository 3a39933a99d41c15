"""Train with rules that have no kernel on packed signs: under every sharding, and on a changing
number of ranks."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks
from tests.integration.runs import NUM_STEPS, TRAIN, assert_same_bits, final_tensors, final_weights

pytestmark = pytest.mark.slow


QUICKNET = (
    "--optim.full_precision keras_sgd --optim.latent_clip 1.25 --optim.lr.kind warmup_cosine --optim.lr.warmup_epochs 1"
)
"""The optimizers of QuickNet's recipe."""
AUGMENTED = (
    "--data.loader torch --data.color_lighting True --data.rand_augment rand-m7-mstd0.5 --data.mixup 0.2 "
    "--data.cutmix 1 --data.label_smoothing 0.1"
)


@pytest.mark.parametrize(
    ("rule", "more", "shardings"),
    [
        ("latent_adam", "", ("none",)),
        ("two_ema", "", ("zero1",)),
        ("latent_adam", QUICKNET, ("none",)),
        ("two_ema", "--optim.full_precision keras_sgd --optim.lr.kind stairs", ("zero1", "zero2", "zero3")),
        ("bop", AUGMENTED, ()),
    ],
    ids=["latent_adam", "two_ema", "quicknet", "sgd", "augmented"],
)
def test_every_sharding_and_number_of_ranks_trains_the_same_bits(
    rule: str, more: str, shardings: tuple[str, ...], tiny: list[str], tmp_path: Path
) -> None:
    """Uninterrupted on two ranks; stopped in mid-epoch and resumed on one; and with another
    sharding."""
    options = [
        *tiny,
        "--num_replicas",
        "2",
        "--num_threads",
        "1",
        "--resume",
        "auto",
        "--optim.rule",
        rule,
        *more.split(),
    ]
    parts = {"straight": [(2, NUM_STEPS, "bits")], "moved": [(2, 17, "bits"), (1, NUM_STEPS, "bits")]}
    parts |= {sharding: [(2, 17, sharding), (2, NUM_STEPS, sharding)] for sharding in shardings}
    for run, jobs in parts.items():
        for num_ranks, last, sharding in jobs:
            place = ["--run_dir", tmp_path / run, "--stop_after_steps", str(last), "--engine.sharding", sharding]
            done = run_ranks(num_ranks, TRAIN, *options, *place, timeout=300)
            assert done.returncode == 0, done.stdout
    assert_same_bits(final_tensors(tmp_path / "straight"), final_tensors(tmp_path / "moved"))
    for sharding in shardings:
        assert_same_bits(final_weights(tmp_path / "straight"), final_weights(tmp_path / sharding))
    weights = final_weights(tmp_path / "straight")
    assert set(weights["blocks.0.conv.weight"].unique().tolist()) == {-1.0, 1.0}
    if rule == "latent_adam":
        latent = final_tensors(tmp_path / "straight")["optim.latent.blocks.0.conv.weight"]
        assert ((latent >= 0) == (weights["blocks.0.conv.weight"].view(-1) > 0)).all()
        assert latent.abs().max() <= (1.25 if "latent_clip" in more else 1.0)
