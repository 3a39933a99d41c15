"""Distil a tiny teacher: the same bits from its cache as from calls, on any ranks, resumed, and
after a kill -9 of `bitfleet data teach`."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from bitfleet.trainer.checkpoint.format import checkpoints, read_meta
from bitfleet.trainer.metrics import read_metrics
from tests.conftest import HANGS, finish, run_bitfleet, run_python, run_ranks, start_python
from tests.integration.runs import NUM_STEPS, TRAIN, assert_same_bits, failed, final_tensors, final_weights, metrics

TEACH = "tests/integration/teach_job.py"
NUM_EPOCHS, NUM_SHARDS = 3, 200 // 4
"""Micro-batches of 4 of 200 images, a shard each."""


def save_teacher(path: Path, num_classes: int) -> Path:
    torch.manual_seed(num_classes)
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=num_classes).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def alone(tiny: list[str]) -> list[str]:
    """Options of a run without a teacher."""
    further = "--num_replicas 4 --num_threads 1 --device cpu --resume auto"
    return [*tiny, *further.split(), "--metrics.diagnostics", "True", "--journal.enabled", "True"]


@pytest.fixture(scope="module")
def options(alone: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a run with a teacher that is called."""
    weights = save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors", 4)
    distill = f"--distill.teacher test_resnet --distill.weights {weights} --distill.temperature 2"
    return [*alone, *distill.split(), "--distill.label_weight", "0.25"]


@pytest.fixture(scope="module")
def called(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 30 steps on two ranks, which call the teacher."""
    run = tmp_path_factory.mktemp("called") / "run"
    done = run_ranks(2, TRAIN, *options, "--run_dir", run, "--stop_after_steps", str(NUM_STEPS))
    assert done.returncode == 0, done.stdout
    assert "distillation: teacher test_resnet (weights sha256 " in done.stdout
    assert "called in every step; temperature 2, labels weigh 0.25" in done.stdout
    return run


@pytest.fixture(scope="module")
def logits(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's logits for three epochs, written without an interruption."""
    folder = tmp_path_factory.mktemp("logits") / "whole"
    done = run_python(TEACH, *options, "--distill.cache", folder)
    assert done.returncode == 0, done.stdout
    assert re.search(f"{folder}/test_resnet-seed0-.*: 3 of 3 epochs are missing, .*; micro-batches of 4", done.stdout)
    assert done.stdout.count(": 200 images in ") == NUM_EPOCHS
    return folder


def test_killed_teaching_continues_to_the_same_files(logits: Path, options: list[str], tmp_path: Path) -> None:
    """Kill -9 in the second epoch; the shards that it left are kept as they are."""
    root = tmp_path / "logits"
    process = start_python(TEACH, *options, "--distill.cache", root)
    give_up = time.monotonic() + HANGS
    while len(list(root.glob("*/epoch-00001-*.npy"))) < 5:
        assert time.monotonic() < give_up
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert finish(process, [TEACH], HANGS).returncode == -signal.SIGKILL
    (folder,) = root.iterdir()
    (whole,) = logits.iterdir()
    assert folder.name == whole.name
    left = {path: path.stat().st_mtime_ns for path in folder.glob("epoch-*.npy")}
    listed = json.loads((folder / "epoch-00001.json").read_text())
    assert 4 <= len(listed) < NUM_SHARDS

    missing = run_python(TRAIN, *options, "--distill.cache", root, "--run_dir", tmp_path / "run")
    failed(missing, "2 epochs from 1 to 2 are missing", "data teach")
    done = run_python(TEACH, *options, "--distill.cache", root)
    assert done.returncode == 0, done.stdout
    assert "epoch 0: is there" in done.stdout
    assert f"epoch 1: {4 * (NUM_SHARDS - len(listed))} images in " in done.stdout
    kept = [path for path in left if path.name.startswith("epoch-00000") or path.name in listed]
    assert all(path.stat().st_mtime_ns == left[path] for path in kept)
    files = {path.name for path in whole.glob("epoch-*.[jn]*")}
    assert len(files) == NUM_EPOCHS * (NUM_SHARDS + 1)
    assert files == {path.name for path in folder.glob("epoch-*.[jn]*")}
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in files)


def test_cached_run_has_the_bits_of_one_that_calls(
    called: Path, logits: Path, options: list[str], tmp_path: Path
) -> None:
    """On one rank, then on two, where it is resumed inside an epoch."""
    run = tmp_path / "run"
    for num_ranks, last in ((1, 17), (2, NUM_STEPS)):
        cached = ["--distill.cache", logits, "--run_dir", run, "--stop_after_steps", str(last)]
        done = run_ranks(num_ranks, TRAIN, *options, *cached)
        assert done.returncode == 0, done.stdout
        assert f"its logits from {logits}" in done.stdout
    assert_same_bits(final_tensors(called), final_tensors(run))
    assert metrics(called) == metrics(run)
    for key in ("optimizer_steps", "schedules", "meter", "teacher_sha"):
        assert read_meta(checkpoints(called)[-1])[key] == read_meta(checkpoints(run)[-1])[key], key
    line = read_metrics(run)[0]
    assert line["loss"] > line["distillation_loss"] > 1.0
    assert 0 < line["teacher_agreement"] < 1


@pytest.mark.slow
def test_lit_and_mixed_images_have_their_logits_in_the_cache(options: list[str], tmp_path: Path) -> None:
    augmented = "--data.color_lighting True --data.mixup 0.2 --data.cutmix 1 --data.label_smoothing 0.1"
    options = [*options, *augmented.split()]
    done = run_python(TEACH, *options, "--distill.cache", tmp_path / "logits")
    assert done.returncode == 0, done.stdout
    for ranks, name, more in ((2, "called", []), (1, "cached", ["--distill.cache", tmp_path / "logits"])):
        place = ["--run_dir", tmp_path / name, "--stop_after_steps", str(NUM_STEPS)]
        done = run_ranks(ranks, TRAIN, *options, *place, *more)
        assert done.returncode == 0, done.stdout
    assert_same_bits(final_tensors(tmp_path / "called"), final_tensors(tmp_path / "cached"))


def test_run_changes_from_its_cache_to_calls(called: Path, logits: Path, options: list[str], tmp_path: Path) -> None:
    """With the first two epochs read, on two ranks, and the third called, on one."""
    for num_ranks, last, source in ((2, 24, ["--distill.cache", logits]), (1, NUM_STEPS, [])):
        place = ["--run_dir", tmp_path / "run", "--stop_after_steps", str(last)]
        done = run_ranks(num_ranks, TRAIN, *options, *source, *place)
        assert done.returncode == 0, done.stdout
    assert_same_bits(final_tensors(called), final_tensors(tmp_path / "run"))


@pytest.mark.parametrize(
    "sharding", ["zero1", *(pytest.param(each, marks=pytest.mark.slow) for each in ("none", "zero2", "zero3"))]
)
def test_other_shardings_train_the_same_bits(
    sharding: str, called: Path, logits: Path, options: list[str], tmp_path: Path
) -> None:
    words = [*options, "--metrics.diagnostics", "False", "--journal.enabled", "False", "--engine.sharding", sharding]
    weights = []
    for source in ([], ["--distill.cache", logits]):
        run = tmp_path / f"run{len(source)}"
        done = run_ranks(2, TRAIN, *words, *source, "--run_dir", run, "--stop_after_steps", str(NUM_STEPS))
        assert done.returncode == 0, done.stdout
        weights.append(final_weights(run))
    assert_same_bits(weights[0], weights[1])
    if sharding in ("none", "zero1"):  # the others add the gradients of two micro-batches in another order
        assert_same_bits(final_weights(called), weights[0])


def test_start_from_weights_seeds_for_the_teachers_loss(
    called: Path, logits: Path, alone: list[str], options: list[str], tmp_path: Path
) -> None:
    """Read from the cache and called: the same state after one step; another one than without a
    teacher."""
    states = []
    for number, words in enumerate((options, [*options, "--distill.cache", logits], alone)):
        run = tmp_path / f"run{number}"
        done = run_python(TRAIN, *words, "--init", called, "--run_dir", run, "--stop_after_steps", "1")
        assert done.returncode == 0, done.stdout
        assert "was seeded with the gradients of 8 steps" in done.stdout
        states.append(final_tensors(run, 1))
    assert_same_bits(states[0], states[1])
    name = "optim.exp_avg_sq.blocks.0.conv.weight"
    assert not torch.equal(states[0][name], states[2][name])


def test_what_does_not_fit_is_refused_before_training(
    called: Path, logits: Path, options: list[str], tmp_path: Path
) -> None:
    ten = save_teacher(tmp_path / "ten.safetensors", 10)
    cached = ["--distill.cache", logits]
    for words, message in (
        (["--distill.weights", ten], ["teacher test_resnet tells 10 classes apart", "the run has 4"]),
        (["--distill.weights", tmp_path / "none"], ["weights of the teacher", "none", "No such file"]),
        ([*cached, "--seed", "1"], ["made for something else: seed is 0 there and 1"]),
        ([*cached, "--num_replicas", "2"], ["made for something else: micro-batch size", "is 4 there and 8"]),
        ([*cached, "--epochs", "4"], ["epoch 3 is missing", "--first_epoch 3 --last_epoch 3"]),
    ):
        run = tmp_path / "run"
        failed(run_python(TRAIN, *options, *words, "--run_dir", run), *message)
        assert not run.exists()
    for words, message in (
        (["--distill.temperature", "3"], ["cannot resume", "distill.temperature is 2.0, here it is 3.0"]),
        (["--distill.weights", save_teacher(tmp_path / "b", 4)], []),  # the same weights elsewhere
    ):
        done = run_python(TRAIN, *options, *words, "--run_dir", called, "--stop_after_steps", "1")
        failed(done, *message) if message else None
        assert bool(message) == bool(done.returncode), done.stdout


def test_doctor_looks_at_the_teacher(logits: Path, options: list[str]) -> None:
    done = run_bitfleet("doctor", *options, "--distill.cache", logits)
    (line,) = [line for line in done.stdout.splitlines() if " teacher " in line]
    assert line.split()[:3] == ["OK", "teacher", "sha256"]
    done = run_bitfleet("doctor", *options, "--distill.cache", logits, "--seed", "1")
    assert done.returncode == 1
    assert "seed is 0 there and 1" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--first_epoch 2 --last_epoch 1", "--first_epoch 2 and --last_epoch 1 must be epochs of the run, 0 to 2"),
        ("--last_epoch 3", "--first_epoch 0 and --last_epoch 3 must be epochs of the run, 0 to 2"),
        ("", "needs the run's --distill.teacher, and a folder as --distill.cache"),
    ],
)
def test_teach_refuses(words: str, message: str, options: list[str]) -> None:
    failed(run_bitfleet("data", "teach", *options, *words.split()), message)
