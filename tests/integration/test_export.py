"""From a run to a device: train, export, run."""

import re
from pathlib import Path

import pytest

from bitfleet.packed import read_description
from bitfleet.trainer.checkpoint.format import checkpoints
from tests.conftest import run_bitfleet, run_ranks
from tests.integration.runs import TRAIN, failed


@pytest.fixture(scope="module")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs on tiny images."""
    run = tmp_path_factory.mktemp("trained") / "run"
    done = run_ranks(1, TRAIN, *tiny, "--run_dir", run, "--device", "cpu")
    assert done.returncode == 0, done.stdout
    return run


def accuracies(output: str) -> tuple[str, str]:
    found: list[tuple[str, str]] = re.findall(r"top-1 ([\d.]+)%  top-5 ([\d.]+)%", output)
    assert len(found) == 1, output
    return found[0]


def test_exported_run_predicts_what_the_run_predicts(trained: Path, tiny_images: Path, tmp_path: Path) -> None:
    program = tmp_path / "net"
    done = run_bitfleet("export", trained, program)
    assert done.returncode == 0, done.stdout
    for words in (
        f"{program}: ",
        "as bits",
        "accuracy of the run: top-1",
        "checked on 16 random images",
        "ms per image",
    ):
        assert words in done.stdout
    ran = run_bitfleet("run", program, "--data", tiny_images)
    assert ran.returncode == 0, ran.stdout
    evaluated = run_bitfleet("evaluate", trained, "--device", "cpu")
    assert accuracies(ran.stdout) == accuracies(evaluated.stdout)
    description = read_description(program)
    assert f"top-1 {description['top1']:.2%}" in evaluated.stdout
    assert description["classes"] == [f"class{label}" for label in range(4)]
    image = next((tiny_images / "val" / "class3").iterdir())
    done = run_bitfleet("run", program, image)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("class") >= 4
    assert "█" in done.stdout


def test_statistics_of_the_last_steps_are_exported(trained: Path, tiny_images: Path, tmp_path: Path) -> None:
    program = tmp_path / "net"
    done = run_bitfleet("export", trained, program, "--precise_bn_steps", "4")
    assert done.returncode == 0, done.stdout
    assert "the images of the last 4 steps" in done.stdout
    assert "accuracy of the run" not in done.stdout
    ran = run_bitfleet("run", program, "--data", tiny_images)
    assert ran.returncode == 0, ran.stdout
    evaluated = run_bitfleet("evaluate", trained, "--device", "cpu", "--precise_bn_steps", "4")
    assert accuracies(ran.stdout) == accuracies(evaluated.stdout)
    plain = tmp_path / "plain"
    assert run_bitfleet("export", trained, plain).returncode == 0
    assert plain.read_bytes() != program.read_bytes()


def test_checkpoint_of_a_run(trained: Path, tmp_path: Path) -> None:
    oldest = checkpoints(trained)[0]
    done = run_bitfleet("export", oldest, tmp_path / "net")
    assert done.returncode == 0, done.stdout
    assert read_description(tmp_path / "net")["source"].endswith(f"step {int(oldest.name.removeprefix('step-'))}")


def test_what_cannot_be_exported_or_run(trained: Path, tiny_images: Path, tmp_path: Path) -> None:
    failed(run_bitfleet("export", tmp_path / "nowhere", tmp_path / "net"), "nowhere")
    failed(run_bitfleet("export", trained, tmp_path / "net", "--model.width", "3"), "--model.width")
    failed(run_bitfleet("run", tmp_path / "net", "--data", tiny_images), "net")
    program = tmp_path / "program"
    program.write_bytes(b"no program")
    failed(run_bitfleet("run", program, next(tiny_images.rglob("*.png"))), "program")


@pytest.mark.slow
def test_top1_on_the_embedded_images_is_the_runs(tmp_path: Path) -> None:
    """Train on Fashion-MNIST for two epochs, as a newcomer does."""
    run, program = tmp_path / "run", tmp_path / "net"
    options = "--config fashion_quickstart --epochs 2 --device cpu".split()
    done = run_ranks(1, TRAIN, *options, "--run_dir", run)
    assert done.returncode == 0, done.stdout
    assert run_bitfleet("export", run, program).returncode == 0
    ran = run_bitfleet("run", program, "--data", "fashion-mnist")
    evaluated = run_bitfleet("evaluate", run, "--device", "cpu")
    assert "1,000 images" in ran.stdout
    assert accuracies(ran.stdout) == accuracies(evaluated.stdout)
