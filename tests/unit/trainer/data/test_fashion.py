"""The embedded Fashion-MNIST: what is in it, and unpacking by several processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitfleet.trainer.data import fashion
from bitfleet.trainer.data.fashion import FULL_ROOT, SUBSET_ROOT, fashion_mnist_root

# Says in a file that it writes the tree, and dies half-way if it is told to.
UNPACK = """
import os, sys
from bitfleet.trainer.data import fashion
write, save = fashion._write_tree, fashion.Image.Image.save
def logged_write(root, images):
    with open(sys.argv[1], "a") as log:
        log.write("written\\n")
    write(root, images)
def dying_save(image, path):
    if path.name == "000300.png":
        os.kill(os.getpid(), 9)
    save(image, path)
fashion._write_tree = logged_write
if "die" in sys.argv:
    fashion.Image.Image.save = dying_save
print(fashion.fashion_mnist_root("fashion-mnist"))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFLEET_CACHE", str(cache))


def unpack(log: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", UNPACK, str(log), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_unpack_once_after_one_was_killed_half_way(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with unpack(log, "die") as killed:
        assert killed.wait(600) == -9
    assert [path.name[:5] for path in cache.iterdir() if path.is_dir()] == [".tmp-"]

    with unpack(log) as first, unpack(log) as second:
        roots = {process.communicate(timeout=600)[0].strip() for process in (first, second)}
    (root,) = roots
    assert log.read_text() == "written\n" * 2  # the killed one and one of the two
    assert [path for path in cache.iterdir() if path.is_dir()] == [Path(root)]
    for split, count in (("train", 600), ("val", 100)):
        counts = [len(list(folder.iterdir())) for folder in sorted(Path(root, split).iterdir())]
        assert counts == [count] * 10


def test_files_hold_the_images_of_the_subset() -> None:
    root = fashion_mnist_root(SUBSET_ROOT)
    subset = fashion.load_subset()
    for split, class_name, label, index in (("train", "0_t-shirt", 0, 0), ("val", "9_ankle-boot", 9, 99)):
        with Image.open(root / split / class_name / f"{index:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), subset[split][label][index])


@pytest.mark.skipif(not fashion._DEBIAN_FOLDER.exists(), reason="dataset-fashion-mnist is not installed")
def test_subset_is_the_first_images_of_each_class_of_the_original() -> None:
    full, subset = fashion.load_full(), fashion.load_subset()
    for split, count, whole in (("train", 600, 6000), ("val", 100, 1000)):
        for ours, original in zip(subset[split], full[split], strict=True):
            assert len(original) == whole
            np.testing.assert_array_equal(ours, original[:count])


def test_full_set_without_the_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "_DEBIAN_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz.*apt-get install dataset-fashion-mnist"):
        fashion_mnist_root(FULL_ROOT)
