"""From raw images to a trained run with the commands of the README, and what a run does when its
data changes under it."""

import os
import shutil
from pathlib import Path

import pytest

from bitfleet.trainer.metrics import read_metrics
from tests.conftest import run_bitfleet, run_ranks
from tests.integration.runs import TRAIN, assert_same_bits, failed, final_tensors

STEPS = 14  # past the first epoch of 12, with its validation
WITHOUT_DALI = """
import sys
sys.modules["nvidia.dali"] = None  # an import of it fails
from bitfleet.launch.train import main
main()
"""

EACH_IN_A_FOLDER_OF_ITS_OWN = """
import os
os.chdir("{folder}/" + os.environ["RANK"])
from bitfleet.launch.train import main
main()
"""


def data(*arguments: str | Path) -> tuple[int, str]:
    done = run_bitfleet("data", *arguments)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def prepared(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny images, prepared in place."""
    root = shutil.copytree(tiny_images, tmp_path_factory.mktemp("prepared") / "images")
    code, output = data("prepare", root, root, "--num_workers", "1")
    assert code == 0, output
    assert "train     200 images" in output
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    """A copy for a test to damage; its manifest goes with it."""
    return shutil.copytree(prepared, tmp_path / "images")


def options_for(tiny: list[str], root: Path, run: Path, *more: str) -> list[str]:
    """The options `tiny` on the data in `root`, for a short run into `run`."""
    own = {"--data.root": str(root), "--run_dir": str(run), "--stop_after_steps": str(STEPS)}
    kept = [part for key, value in zip(tiny[::2], tiny[1::2], strict=True) for part in (key, own.pop(key, value))]
    return [*kept, *(part for item in own.items() for part in item), *more]


@pytest.mark.slow
def test_folders_shards_and_the_other_loader_train_the_same_bits(root: Path, tiny: list[str], tmp_path: Path) -> None:
    """Nothing is resized here, so that DALI and torchvision give the same bytes, and a packed PNG
    would not."""
    assert data("verify", root, "--num_workers", "1")[0] == 0
    script = tmp_path / "without_dali.py"
    script.write_text(WITHOUT_DALI)
    done = run_ranks(2, TRAIN, *options_for(tiny, root, tmp_path / "a"))
    assert done.returncode == 0, done.stdout
    assert f"data: 200 training and 28 validation images of 4 classes in {root}" in done.stdout
    done = run_ranks(2, script, *options_for(tiny, root, tmp_path / "b", "--data.loader", "torch"))
    assert done.returncode == 0, done.stdout
    assert_same_bits(final_tensors(tmp_path / "a", STEPS), final_tensors(tmp_path / "b", STEPS))
    in_memory = ["--data.loader", "memory"]
    done = run_ranks(2, TRAIN, *options_for(tiny, root, tmp_path / "m", *in_memory))
    assert done.returncode == 0, done.stdout
    assert "keeps a copy of its own" not in done.stdout
    assert_same_bits(final_tensors(tmp_path / "a", STEPS), final_tensors(tmp_path / "m", STEPS))
    further = ["--resume", "auto", "--stop_after_steps", str(STEPS + 3)]
    for run, loader in (("m", []), ("a", in_memory)):  # each continues with the loader of the other
        done = run_ranks(2, TRAIN, *options_for(tiny, root, tmp_path / run, *loader), *further)
        assert done.returncode == 0, done.stdout
    assert_same_bits(final_tensors(tmp_path / "a", STEPS + 3), final_tensors(tmp_path / "m", STEPS + 3))
    done = run_ranks(2, script, *options_for(tiny, root, tmp_path / "c"))
    failed(done, "NVIDIA DALI, which reads the images, is not installed")

    code, output = data("pack", root, tmp_path / "packed", "--shards", "--short_side", "32", "--num_workers", "1")
    assert code == 0, output
    done = run_ranks(2, TRAIN, *options_for(tiny, tmp_path / "packed", tmp_path / "d"))
    assert done.returncode == 0, done.stdout
    done = run_ranks(2, TRAIN, *options_for(tiny, tmp_path / "packed", tmp_path / "a"), "--resume", "auto")
    failed(done, "it was trained on other data")


def test_an_image_that_vanishes_ends_the_job_or_is_replaced(root: Path, tiny: list[str], tmp_path: Path) -> None:
    for number in (3, 4):
        (root / f"train/class1/{number:04d}.png").unlink()
    (root / "val/class0/0001.png").write_bytes(b"")
    options = options_for(tiny, root, tmp_path / "run")
    failed(run_ranks(2, TRAIN, *options), "train/class1/000")

    done = run_ranks(2, TRAIN, *options, "--resume", "auto", "--data.on_bad_sample", "replace")
    assert done.returncode == 0, done.stdout
    lines = read_metrics(tmp_path / "run")
    assert [line["replaced_samples"] for line in lines if line["kind"] == "train"][-1] >= 1
    assert [line["num_images"] for line in lines if line["kind"] == "validation"] == [27]
    assert "0001.png cannot be decoded" in done.stdout
    assert "left out of validation (1 of at most 100)" in done.stdout

    code, output = data("verify", root, "--num_workers", "1")
    assert (code, "3 failed" in output) == (1, True), output
    resume = [*options, "--resume", "auto", "--stop_after_steps", str(STEPS + 1)]
    failed(run_ranks(2, TRAIN, *resume), "bitfleet data verify, makes it another one")
    done = run_ranks(2, TRAIN, *options_for(tiny, root, tmp_path / "again"))
    assert done.returncode == 0, done.stdout
    assert "198 training and 27 validation images of 4 classes" in done.stdout
    assert "3 that bitfleet data verify or prepare set aside are LEFT OUT" in done.stdout


@pytest.mark.slow
def test_ranks_with_different_data_do_not_train(root: Path, tiny: list[str], tmp_path: Path) -> None:
    """Two nodes, each with its own copy: on one of them verify set an image aside."""
    for rank in "01":
        shutil.copytree(root, tmp_path / rank / "data")
    (tmp_path / "1/data/train/class1/0003.png").write_bytes(b"")
    assert data("verify", tmp_path / "1/data", "--num_workers", "1")[0] == 1
    script = tmp_path / "train.py"
    script.write_text(EACH_IN_A_FOLDER_OF_ITS_OWN.format(folder=tmp_path))
    done = run_ranks(2, script, *options_for(tiny, Path("data"), tmp_path / "run"))
    failed(done, "in the lists of images in data (sha256)")


@pytest.mark.slow
def test_class_folders_that_one_rank_does_not_have_whole_end_the_job(
    tiny_images: Path, tiny: list[str], tmp_path: Path
) -> None:
    """Never prepared; what is left out on one rank ends all of them, and what all ranks allow is
    said once."""
    for rank in "01":
        shutil.copytree(tiny_images, tmp_path / rank / "data")
    (tmp_path / "1/data/val/class1").rename(tmp_path / "1/data/val/.class1")
    script = tmp_path / "train.py"
    script.write_text(EACH_IN_A_FOLDER_OF_ITS_OWN.format(folder=tmp_path))
    options = options_for(tiny, Path("data"), tmp_path / "run")
    done = run_ranks(2, script, *options)
    failed(done, "'class1' is in train/ only; add it to val/")
    assert done.stdout.count("bitfleet: error") == 1
    assert "7 hidden" in done.stdout

    (tmp_path / "0/data/val/class1").rename(tmp_path / "0/data/val/.class1")
    done = run_ranks(2, script, *options, "--data.allow_incomplete", "True")
    assert done.returncode == 0, done.stdout
    assert "; not listed: val: 7 hidden" in done.stdout
    assert done.stdout.count("INCOMPLETE: not listed from ") == 1


@pytest.mark.slow
def test_a_disk_that_does_not_answer_ends_the_job(root: Path, tiny: list[str], tmp_path: Path) -> None:
    """A named pipe without a writer: opening it never returns."""
    victim = root / "train/class1/0003.png"
    victim.unlink()
    os.mkfifo(victim)
    done = run_ranks(2, TRAIN, *options_for(tiny, root, tmp_path / "run", "--data.stall_seconds", "3"))
    failed(done, f"the disk does not answer: {victim} could not be read within 3 s")


def test_compare_tells_how_far_the_loaders_are_apart(prepared: Path) -> None:
    options = ["--data.augmentation", "random_resized_crop", "--data.root", str(prepared), "--model.num_classes", "4"]
    code, output = data("compare", "--config", "fashion_quickstart", "--images", "20", *options)
    assert code == 0, output
    assert "every image is the same but for rounding" in output


def test_set_aside_on_the_command_line(root: Path, tmp_path: Path) -> None:
    for name in ("0003.png", "0005.png"):
        (root / "train/class1" / name).write_bytes(b"")
    code, output = data("verify", root, "--num_workers", "1")
    assert code == 1
    (root / "manifest.json").unlink()
    code, output = data("prepare", root, tmp_path / "dest", "--num_workers", "1")
    assert code == 2
    assert (
        f"2 images cannot be read; replace or remove them, or set them aside with --on_bad_sample quarantine: {root}/"
        in output
    )
    assert output.count("(the file is empty)") == 2
    code, output = data("prepare", root, tmp_path / "dest", "--num_workers", "1", "--on-bad-sample=quarantine")
    assert code == 0
    assert "SET ASIDE: 2 images, which stay where they are" in output
    assert str(tmp_path / "dest/quarantine.tsv") in output
    code, output = data("pack", tmp_path / "dest", tmp_path / "packed", "--short_side", "32", "--num_workers", "1")
    assert code == 0, output
    assert "RuntimeWarning" not in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prepare", "x"], "bitfleet data prepare: PATH"),
        (["verify", "{root}", "--num_wokers", "2"], "--num_wokers; did you mean --num_workers"),
        (["verify", "{root}", "--num_workers", "0"], "--num_workers: must be a positive number, not '0'"),
        (["prepare", "x", "y", "--on_bad_sample", "move"], "'move' for argument '--on_bad_sample'"),
        (["unpack", "x", "y"], "there is no command 'unpack' of bitfleet data"),
        (["pack", "{root}", "{root}"], "exists already"),
    ],
)
def test_bad_input_gets_a_sentence(prepared: Path, arguments: list[str], sentence: str) -> None:
    done = run_bitfleet("data", *(a.format(root=prepared) for a in arguments))
    failed(done, sentence)
