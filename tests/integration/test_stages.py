"""Train the two stages of a ReActNet recipe on tiny images."""

import re
from pathlib import Path

import pytest

from tests.conftest import run_bitfleet, run_ranks
from tests.integration.runs import TRAIN, assert_same_bits, final_tensors, final_weights

pytestmark = pytest.mark.slow

KERNEL = "blocks.1.binary.conv.weight"


def options(images: Path, stage: str) -> list[str]:
    """The recipe with a small network and no teacher, 2 epochs of 12 steps."""
    config = f"--config reactnet18_imagenet_{stage} --data.root {images} --data.image_size 32 --model.num_classes 4"
    small = "--model.name reactnet_small --epochs 2 --global_batch_size 16 --num_replicas 2 --num_threads 1"
    return [*f"{config} {small} --data.loader torch --distill.teacher".split(), ""]


def test_stage_2_starts_with_the_kernels_of_stage_1_as_latent_weights(tiny_images: Path, tmp_path: Path) -> None:
    first = run_ranks(2, TRAIN, *options(tiny_images, "stage1"), "--run_dir", tmp_path / "stage1", timeout=300)
    assert first.returncode == 0, first.stdout
    assert "step 1: real_adam updated all 6 binary weights, 73,728 elements" in first.stdout
    real = final_weights(tmp_path / "stage1", 24)[KERNEL]
    assert len(real.unique()) > 1000
    run = tmp_path / "stage2"
    second = [*options(tiny_images, "stage2"), "--init", tmp_path / "stage1", "--run_dir", run, "--resume", "auto"]
    done = run_ranks(2, TRAIN, *second, "--stop_after_steps", "1", timeout=300)
    assert done.returncode == 0, done.stdout
    assert "step 1: latent_adam updated all 6 binary weights" in done.stdout
    assert "The binary weights start as real values" not in done.stdout
    latent = final_tensors(run, 1)[f"optim.latent.{KERNEL}"]
    moved = (latent - real.flatten()).abs()
    assert 0 < moved.max() <= 2.5e-3 / 2 * 1.01  # the first of 2 epochs has half of the learning rate
    done = run_bitfleet("train", *second)  # on one rank
    assert done.returncode == 0, done.stdout
    moved_run = final_tensors(run, 24)
    straight = [*options(tiny_images, "stage2"), "--init", tmp_path / "stage1", "--run_dir", tmp_path / "straight"]
    done = run_ranks(2, TRAIN, *straight, timeout=300)
    assert done.returncode == 0, done.stdout
    assert_same_bits(final_tensors(tmp_path / "straight", 24), moved_run)
    assert set(final_weights(run, 24)[KERNEL].unique().tolist()) == {-1.0, 1.0}
    assert re.search(r"conv\.weight +16x16x3x3 +binary +latent_adam", done.stdout)


def test_flip_rules_start_from_stage_1_with_seeded_state(tiny_images: Path, tmp_path: Path) -> None:
    done = run_bitfleet("train", *options(tiny_images, "stage1"), "--run_dir", tmp_path / "stage1")
    assert done.returncode == 0, done.stdout
    real = final_weights(tmp_path / "stage1", 24)[KERNEL]
    rule = "--optim.rule bop2ndorder --optim.init_inertia 0.4 --stop_after_steps 1".split()
    second = [*options(tiny_images, "bop2ndorder"), "--init", tmp_path / "stage1", "--run_dir", tmp_path / "bop"]
    done = run_bitfleet("train", *second, *rule)
    assert done.returncode == 0, done.stdout
    flipped = (final_weights(tmp_path / "bop", 1)[KERNEL] != real.sign()).float().mean()
    assert flipped < 0.1
